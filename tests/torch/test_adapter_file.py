"""The file of an adapter: its checksum, and saves that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import drlora_torch
from drlora_core import atomic
from drlora_torch.storage import adapter_file
from tests.torch import models
from tests.torch.test_checkpoint import FILE, refused, trained
from tests.torch.test_life import Picture


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained(5, router="trainable").save_pretrained(tmp_path)
    return tmp_path


def test_no_flipped_byte_is_loaded(saved: Path) -> None:
    """Header, description and weights; what says the same in other bytes (white space) may pass."""
    whole = bytearray((saved / FILE).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    model = models.build()
    picture = Picture(model)
    tensors, description = adapter_file.read(saved)
    for at in [*rng.choice(header, 100), *rng.choice(len(whole), 100), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        (saved / FILE).write_bytes(damaged)
        try:
            held, told = adapter_file.read(saved)
        except drlora_torch.CheckpointError:
            continue
        assert told == description
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[key], tensors[key]) for key in held)
    with pytest.raises(drlora_torch.CheckpointError, match=rf"{FILE} is damaged: its .* checksum"):
        drlora_torch.load(model, saved)
    picture.assert_unchanged(model)


def test_a_checksum_may_lack_but_not_be_renamed(saved: Path) -> None:
    """Older files have none. A flipped byte in its name does not make a file an older one."""
    tensors = load_file(saved / FILE)
    with safe_open(saved / FILE, framework="pt") as file:
        metadata = file.metadata()
    told = {adapter_file.KEY: metadata[adapter_file.KEY]}
    save_file(tensors, saved / FILE, metadata={**told, "format": "pt"})
    assert drlora_torch.load(models.build(), saved).engine.step_count
    save_file(tensors, saved / FILE, metadata={**told, "drlora_sha257": metadata["drlora_sha256"]})
    refused(saved, "checksum differs")


def test_a_checksum_covers_names_dtypes_and_shapes() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    others = [
        {**one, "a": torch.zeros(3, 2)},
        {**one, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**one, "a": -torch.zeros(2, 3)},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"]},
    ]
    sums = [adapter_file.checksum(each, "{}") for each in (one, *others)]
    assert len({*sums, adapter_file.checksum(one, "{ }")}) == len(others) + 2
    assert adapter_file.checksum(dict(reversed(one.items())), "{}") == sums[0]


# -- saves that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["writing", "half written", "replacing"])
def test_a_failed_save_leaves_the_old_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before = (saved / FILE).read_bytes()
    adapter = trained(2)

    def full(tensors: Any, path: Any, metadata: Any = None) -> None:
        if when == "half written":
            Path(path).write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    if when == "replacing":
        monkeypatch.setattr(os, "replace", lambda *_: full({}, ""))
    else:
        monkeypatch.setattr(adapter_file, "save_file", full)
    with pytest.raises(drlora_torch.CheckpointError, match=r"No space left.* untouched"):
        adapter.save_pretrained(saved)
    monkeypatch.undo()
    assert os.listdir(saved) == [FILE]
    assert (saved / FILE).read_bytes() == before
    assert drlora_torch.load(models.build(), saved).engine.step_count == 5


def test_an_interrupted_save_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    adapter = trained(1)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(drlora_torch.CheckpointError, match="could not write"):
        trained(0).save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_equal_content_is_an_equal_file(tmp_path: Path) -> None:
    """Safetensors alone writes its metadata in another order each time."""
    tensors = {'ä\x1f"': torch.arange(4.0), "b": torch.zeros(2, 3)}
    for number in range(12):
        adapter_file.write(tmp_path / str(number), tensors, {"name": "\u2028 \\ \x7f"})
    files = {(tmp_path / str(number) / FILE).read_bytes() for number in range(12)}
    assert len(files) == 1
    held, told = adapter_file.read(tmp_path / "3")
    assert told == {"name": "\u2028 \\ \x7f"}
    assert all(torch.equal(held[key], tensors[key]) for key in tensors)
