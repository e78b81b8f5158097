"""What came out of a piece of work, in digests that must not differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from drlora_core import atomic
from drlora_core.locks import FolderLock

Outcome = dict[str, Any]
LEFT = (".drlora-*", ".run-*", ".lock")
"""What a process that was killed may leave; the next one that writes there takes it away."""


def digest(values: Any) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def digests(folder: Path, *patterns: str) -> Outcome:
    """Digest of every file that matches, by its path; names of temporary files are left out."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(files)
        if not any(part.startswith(".drlora-") for part in file.relative_to(folder).parts)
    }


def leftovers(place: Path) -> list[str]:
    """Temporary files and folders that are still there after another one has written beside them.

    Work that is killed in its last moments has nothing to do when it is gone on with.
    """
    for folder in {each.parent for pattern in LEFT for each in place.rglob(pattern)}:
        lock = FolderLock(folder)  # nobody holds it
        atomic.write_text(folder / "later", "")
        (folder / "later").unlink()
        lock.release()
    return sorted(str(each.relative_to(place)) for pattern in LEFT for each in place.rglob(pattern))


def differences(wanted: Outcome, found: Outcome) -> list[str]:
    """Name what differs."""
    names = sorted(wanted.keys() | found.keys())
    return [
        f"{name} is {'missing' if name not in found else 'new' if name not in wanted else 'other'}"
        for name in names
        if wanted.get(name) != found.get(name)
    ]
