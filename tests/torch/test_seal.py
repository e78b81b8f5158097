"""The seal of a checkpoint: damage is found, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_torch.storage.seal import SEAL, broken_by, seal

FILES = {"optimizer.pt": b"state" * 40, "scheduler.pt": b"", "rng_state.pth": b"random"}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "rng_state_1.pth").write_bytes(b"of another process")
    (folder / "global_step").mkdir()
    restore(folder)
    seal(folder)
    return folder


def restore(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def test_what_was_written_fits_its_seal(sealed: Path) -> None:
    assert broken_by(sealed) is None
    assert set(json.loads((sealed / SEAL).read_text())["files"]) == set(FILES)
    (sealed / "rng_state_1.pth").write_bytes(b"changed")
    (sealed / "README.md").write_text("written later")
    assert broken_by(sealed) is None


@given(st.sampled_from(sorted(FILES)), st.integers(0, 199), st.integers(0, 255))
def test_any_changed_byte_is_found(sealed: Path, name: str, place: int, byte: int) -> None:
    content = bytearray(FILES[name])
    content[place : place + 1] = [byte]
    (sealed / name).write_bytes(content)
    found = broken_by(sealed)
    restore(sealed)
    same = bytes(content) == FILES[name]
    assert found == (None if same else f"{name} has changed since it was written")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(sealed: Path, name: str) -> None:
    (sealed / name).unlink()
    assert broken_by(sealed) == f"{name} is missing"
    restore(sealed)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": [1]}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "[" * 10**5],
)
def test_a_damaged_seal_is_found(text: str, tmp_path: Path) -> None:
    assert broken_by(tmp_path) is None  # none
    (tmp_path / SEAL).write_text(text)
    assert broken_by(tmp_path) == f"{SEAL} cannot be read"


def test_a_seal_reads_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "inside").mkdir()
    entry = {"../secret": {"size": 4, "sha256": "0"}}
    (tmp_path / "inside" / SEAL).write_text(json.dumps({"files": entry}))
    assert broken_by(tmp_path / "inside") == "../secret is missing"
