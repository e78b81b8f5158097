"""Rows of local files, each with the place that an error names."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from drlora_core.errors import near_misses, shorten
from drlora_torch.errors import DataError

RUN_FILE = "run.yaml"
"""A folder that holds it is that of a run."""
LONGEST_CELL = 2**31 - 1
UNPACKED, SMALL = 100, 2**30
"""Limit of what a packed file unpacks to: ``SMALL`` bytes plus ``UNPACKED`` times its size."""
PARQUET_ROWS = 256  # read at a time
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


class Row(NamedTuple):
    """One row as it was read."""

    values: dict[str, Any]
    place: str
    """Where it stands: ``data.jsonl, line 3``."""


def find_files(path: Path) -> dict[str, list[Path]]:
    """Return the files of each split: of a folder, by the names in it, or one file.

    Hidden files and folders, and the folders of runs, are left out.

    Raises:
        DataError: there is no such file, none in the folder, or its ending is not known.
    """
    if not path.is_dir():
        _reader_of(path)
        if not path.is_file():
            raise DataError(f"data {str(path)!r}: there is no such file")
        return {"train": [path]}
    found: dict[str, list[Path]] = {}
    for file in _walk(path):
        found.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not found:
        raise DataError(f"data {str(path)!r}: the folder holds no file that ends in {_endings()}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that can be read; not what is hidden, nor what a run wrote."""
    if (folder / RUN_FILE).is_file():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif _ending(path) in READERS:
            yield path


def read_file(file: Path) -> Iterator[Row]:
    """Yield the rows of a file; one that is not UTF-8 or not well formed is a DataError."""
    try:
        for place, values in _reader_of(file)(file):
            where = f"{file.name}, {place}"
            if not isinstance(values, dict):
                raise DataError(
                    f"{where}: a row must be an object with columns, got {shorten(values)}"
                )
            yield Row(values, where)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data {str(file)!r} cannot be read: {error}") from error


def _split_of(file: Path) -> str:
    """The split that the name of a file says, or else that of a folder around it."""
    for part in reversed(file.parts):
        stem = part.partition(".")[0].lower()
        for split, names in SPLITS.items():
            if any(stem == name or stem.startswith((f"{name}-", f"{name}_")) for name in names):
                return split
    return "train"


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, io.BufferedReader(_Unpacking(file)))
    return file.open("rb")


class _Unpacking(io.RawIOBase):
    """What a gzip file unpacks to; too many bytes are a DataError."""

    def __init__(self, file: Path) -> None:
        self._file, self._most = file.name, SMALL + UNPACKED * file.stat().st_size
        self._packed, self._left = gzip.GzipFile(file, "rb"), self._most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._packed.readinto(buffer)
        self._left -= size
        if self._left < 0:
            raise DataError(
                f"{self._file} unpacks to more than {self._most:,} bytes, {UNPACKED} times its "
                f"size and {SMALL:,}; unpack it yourself if you want its rows"
            )
        return size

    def close(self) -> None:
        self._packed.close()
        super().close()


def _decode(content: bytes, file: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise DataError(
            f"{file.name}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); convert the "
            "file, for example: iconv -f latin-1 -t utf-8"
        ) from error


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with _open(file) as lines:
        for number, content in enumerate(lines, 1):
            text = _decode(content, file, number).strip()
            if not text:
                continue
            try:
                yield f"line {number}", json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file.name}, line {number}: not JSON ({error})") from error


def _read_array(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array; objects one after the other are read as in a .jsonl file."""
    with _open(file) as content:
        text = _decode(content.read(), file, 1)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise DataError(f"{file.name}: not JSON ({error})") from error
        yield from _read_lines(file)
        return
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{file.name}: must hold an array of objects, got {shorten(rows)}")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    with _open(file) as content:
        text = io.StringIO(_decode(content.read(), file, 1), newline="")
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.DictReader(text, strict=True)
    try:
        names = list(rows.fieldnames or ())
        if len(set(names)) < len(names):
            raise DataError(f"{file.name}: a column is there twice in {', '.join(names)}")
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise DataError(
                    f"{file.name}, row {number}: has another number of columns than the header "
                    f"({', '.join(names)})"
                )
            yield f"row {number}", dict(row)
    except csv.Error as error:
        raise DataError(f"{file.name}, line {rows.line_num}: not CSV ({error})") from error


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
            if batch.nbytes > SMALL:
                raise DataError(
                    f"{file.name}: {len(batch)} rows from row {number + 1} on unpack to "
                    f"{batch.nbytes:,} bytes; accepted: at most {SMALL:,}"
                )
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # no UTF-8, no date
        raise DataError(f"{file.name}: not Parquet ({error})") from error


def _read_paragraphs(file: Path) -> Iterator[tuple[str, Any]]:
    paragraph: list[str] = []
    start = 1
    with _open(file) as lines:
        for number, content in enumerate(itertools.chain(lines, [b"\n"]), 1):
            line = _decode(content, file, number)
            if line.strip():
                start = start if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield f"line {start}", {"text": "".join(paragraph).rstrip("\r\n")}
                paragraph = []


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_lines,
    ".json": _read_array,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}


def _ending(file: Path) -> str:
    """The ending that says how a file is read, without ``.gz``."""
    name = file.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    return "" if name.endswith(".parquet.gz") else ending


def _endings() -> str:
    return f"{', '.join(READERS)} (or .gz of all but .parquet)"


def _reader_of(file: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    ending = _ending(file)
    if ending not in READERS:
        hint = near_misses(ending, READERS)
        hint = f"; {hint}" if hint.endswith("?") else ""
        raise DataError(f"data {str(file)!r} must end in one of {_endings()}{hint}")
    return READERS[ending]
