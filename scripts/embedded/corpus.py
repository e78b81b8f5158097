"""Collect the text that the small models are pretrained on.

All text comes from the Python installation that runs the script: the standard library and the
dependencies of this project. So the corpus needs no download, and anyone can rebuild the model. The
kinds of text are as different as possible, so that experts specialise.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

STDLIB = Path(sysconfig.get_paths()["stdlib"])
INCLUDE = Path(sysconfig.get_paths()["include"])
SITE = Path(sysconfig.get_paths()["purelib"])

KIND_BYTES = 1_200_000
"""Maximum text per kind; kinds are sampled evenly, so more would not be used."""

FILE_BYTES = 48_000
"""Maximum text per file, so no single file dominates its kind."""

OWN = "drlora"
"""This project is excluded: its files depend on how it is installed."""

HELD_OUT = 0.1
PARAGRAPH = 80
"""Repeated paragraphs of at least this many characters are dropped."""


@dataclass(frozen=True)
class Document:
    """A file or a section of a file, with a name that does not depend on the installation path."""

    name: str
    text: str


@dataclass
class Kind:
    """The documents of one kind of text: training and held-out part."""

    name: str
    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Counts for the model card."""
        return {
            "train_documents": len(self.train),
            "train_bytes": sum(len(d.text.encode()) for d in self.train),
            "held_out_documents": len(self.held_out),
            "held_out_bytes": sum(len(d.text.encode()) for d in self.held_out),
        }


def _dist_infos() -> Iterator[Path]:
    """Yield the metadata directories of all packages but this one."""
    yield from (p for p in sorted(SITE.glob("*.dist-info")) if not p.name.startswith(OWN))


def _files(root: Path, pattern: str, skip: str = r"^$") -> Iterator[Document]:
    """Yield the readable text files under ``root`` that ``skip`` does not match."""
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or re.search(skip, name):
            continue
        try:
            yield Document(f"{root.name}/{name}", path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue


def _sections(document: Document, size: int = 8_000) -> Iterator[Document]:
    """Split a long document at blank lines, for kinds with few files."""
    part: list[str] = []
    number = length = 0
    for paragraph in document.text.split("\n\n"):
        part.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield Document(f"{document.name}#{number}", "\n\n".join(part))
            part, length, number = [], 0, number + 1
    if part:
        yield Document(f"{document.name}#{number}", "\n\n".join(part))


def _python() -> Iterator[Document]:
    """Python source: the standard library without tests, tables and bundled packages."""
    skipped = "site-packages|test|tests|idle_test|encodings|pydoc_data|lib2to3|ensurepip"
    yield from _files(STDLIB, "*.py", rf"(^|/)({skipped})/")


def _stubs() -> Iterator[Document]:
    """Type stubs: signatures without bodies."""
    for package in ("numpy", "torch"):
        yield from _files(SITE / package, "*.pyi", r"(^|/)tests/")


def _headers() -> Iterator[Document]:
    """C and C++ headers of CPython, NumPy and PyTorch's core library."""
    yield from _files(INCLUDE, "*.h")
    yield from _files(SITE / "numpy" / "_core" / "include", "*.h")
    yield from _files(SITE / "torch" / "include" / "c10", "*.h")


def _prose() -> Iterator[Document]:
    """English documentation: the language reference's topics and packages' descriptions."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"pydoc/{name}", text)
    found = {d.name.lower(): d for d in importlib.metadata.distributions()}
    for name, distribution in sorted(found.items()):
        body = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if name != OWN and isinstance(body, str) and len(body) > 500:
            yield Document(f"description/{name}", body)


def _licences() -> Iterator[Document]:
    """Licence texts that packages ship with their metadata."""
    for path in _dist_infos():
        for document in _files(path, "*", r"(METADATA|RECORD|WHEEL|\.txt\.in|\.json|\.py)$"):
            if re.search(r"licen[cs]e|copying|notice", document.name.lower()):
                yield document


def _charmaps() -> Iterator[Document]:
    """Character tables of the standard library's codecs."""
    for document in _files(STDLIB / "encodings", "*.py"):
        _, found, table = document.text.partition("decoding_map = codecs")
        if not found:
            _, found, table = document.text.partition("decoding_table = (")
        if found:
            yield Document(document.name, table)


def _vectors() -> Iterator[Document]:
    """Floating-point test vectors: lines of hexadecimal numbers."""
    yield from _files(SITE / "numpy" / "_core" / "tests" / "data", "*.csv")


def _json() -> Iterator[Document]:
    """JSON records: bills of materials of compiled packages, and tables of PyTorch and others."""
    for path in _dist_infos():
        yield from _files(path, "*.json")
    for package in ("torch", "datasets"):
        yield from _files(SITE / package, "*.json")


def _yaml() -> Iterator[Document]:
    """YAML: PyTorch's declarations of its operators and of their derivatives."""
    for document in _files(SITE / "torchgen", "*.yaml"):
        yield from _sections(document)


KINDS: dict[str, Callable[[], Iterator[Document]]] = {
    "python": _python,
    "stubs": _stubs,
    "headers": _headers,
    "prose": _prose,
    "licences": _licences,
    "charmaps": _charmaps,
    "vectors": _vectors,
    "json": _json,
    "yaml": _yaml,
}


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """Drop paragraphs that occurred in an earlier document, e.g. licence headers."""
    kept = []
    for paragraph in text.split("\n\n"):
        plain = " ".join(paragraph.split()).lower()
        if len(plain) >= PARAGRAPH:
            digest = hashlib.sha256(plain.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept).strip("\n")


def _shorten(text: str) -> str:
    """The first ``FILE_BYTES`` characters of ``text``, cut at a line end."""
    return text if len(text) <= FILE_BYTES else text[:FILE_BYTES].rpartition("\n")[0]


def _split(name: str, documents: list[Document], rng: np.random.Generator) -> Kind:
    """Hold out whole documents, up to the share ``HELD_OUT`` of the text."""
    order = [documents[i] for i in rng.permutation(len(documents))]
    kind, taken = Kind(name), 0
    budget = min(KIND_BYTES, sum(len(d.text) for d in order))
    for document in order:
        if taken >= KIND_BYTES:
            break
        enough = sum(len(d.text) for d in kind.held_out) >= HELD_OUT * budget
        (kind.train if enough else kind.held_out).append(document)
        taken += len(document.text)
    return kind


def collect(seed: int) -> list[Kind]:
    """Collect all kinds without repeated paragraphs, split by document."""
    seen: set[bytes] = set()
    kinds = []
    for number, (name, source) in enumerate(KINDS.items()):
        documents = []
        for document in source():
            text = _shorten(_without_repeats(document.text, seen))
            if len(text) >= 200:
                documents.append(Document(document.name, text))
        kind = _split(name, documents, np.random.default_rng([seed, number]))
        if not kind.train or not kind.held_out:
            raise RuntimeError(f"this installation has too little text of the kind {name!r}")
        kinds.append(kind)
    return kinds


def digest(kinds: list[Kind]) -> str:
    """Hash of a corpus."""
    total = hashlib.sha256()
    for kind in kinds:
        for document in [*kind.train, *kind.held_out]:
            total.update(f"{kind.name}\0{document.name}\0{document.text}\0".encode())
    return total.hexdigest()
