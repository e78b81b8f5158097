"""The seal of a checkpoint: the size and hash of its files, written after all of them.

A checkpoint of the Trainer is a folder of several files. A crash may cut one short, and a disk or a
copy may lose or change one. Such a checkpoint does not fit its seal, and a run goes on from an
older one. Checkpoints without a seal, of others, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from drlora_core import atomic

SEAL = "drlora_seal.json"
OF_OTHERS = re.compile(r"rng_state_\d+\.pth")  # other processes may be writing theirs


def seal(folder: Path) -> None:
    """Flush the files of a folder to disk and write its seal; subfolders are left out."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != SEAL and not OF_OTHERS.fullmatch(file.name):
            atomic.sync(file)
            files[file.name] = {"size": file.stat().st_size, "sha256": _hash(file)}
    atomic.write_text(folder / SEAL, json.dumps({"files": files}, indent=2) + "\n")


def broken_by(folder: Path) -> str | None:
    """Say what does not fit the seal of a folder; None if all does, or there is no seal."""
    try:
        files: Any = json.loads((folder / SEAL).read_bytes())["files"]
        known = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{SEAL} cannot be read"
    for name, (size, digest) in known.items():
        file = folder / Path(name).name  # never outside of the folder
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _hash(file) != digest:
            return f"{name} has changed since it was written"
    return None


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
