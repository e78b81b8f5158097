"""Every public function that takes a path takes a str, a Path and any os.PathLike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drlora_torch
from drlora_core import Recording
from drlora_core.recording import RecordingWriter, load_trace
from tests.core import recorded
from tests.torch import helpers, models


class Like:
    """A path that is neither a str nor a Path, and has no useful ``str()``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


KINDS: dict[str, Callable[[Path], Any]] = {"str": str, "Path": Path, "PathLike": Like}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return KINDS[request.param]


def test_paths_of_the_core(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(kind(tmp_path / "run"))
    recorded.drive(engine, 3)
    engine.record_to(RecordingWriter(kind(tmp_path / "other"), engine))
    engine.record_to(None)
    opened = Recording.open(kind(tmp_path / "run"))
    assert opened.steps == 3
    opened.save(kind(tmp_path / "saved"))
    assert Recording.open(tmp_path / "saved").steps == 3
    np.savez(tmp_path / "trace.npz", weight_sum=np.ones((2, 1, 4)), tokens=np.full(2, 8))
    assert load_trace(kind(tmp_path / "trace.npz")).steps == 2


def test_paths_of_an_adapter(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    adapter = helpers.attach(models.build(), record=kind(tmp_path / "run"))
    assert isinstance(adapter, drlora_torch.Adapter)
    adapter.save_pretrained(kind(tmp_path / "saved"))
    adapter.restore(kind(tmp_path / "saved"))
    loaded = drlora_torch.load(models.build(), kind(tmp_path / "saved"))
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)
    adapter.merge_and_save(kind(tmp_path / "merged"), compare=False)
    assert (tmp_path / "merged" / "config.json").is_file()
    adapter.export_peft(kind(tmp_path / "peft"))
    errors = helpers.attach(models.build()).import_peft(kind(tmp_path / "peft"))
    assert set(errors) == set(adapter.ranks())


def test_a_missing_path_is_named(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(drlora_torch.CheckpointError, match=str(missing)):
        drlora_torch.load(models.build(), kind(missing))


def test_paths_of_trainers(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    trainer = pytest.importorskip("drlora_torch.integrations.trainer")
    assert trainer.last_checkpoint(kind(tmp_path)) is None
    adapter = helpers.attach(models.build())
    callback = trainer.DRLoRACallback(adapter, resume_from=kind(tmp_path))
    assert os.fspath(callback.resume_from) == str(tmp_path)


def test_the_path_of_a_packed_checkpoint(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    stored = {"model_type": "olmoe", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(drlora_torch.ModelError, match=f"'{tmp_path}' is quantized with 'awq'"):
        drlora_torch.packed_config(kind(tmp_path))
