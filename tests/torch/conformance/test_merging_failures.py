"""Merges that fail at any point leave weights and files as they were."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drlora_torch
from drlora_torch.lifecycle.residents import Residents
from drlora_torch.merge import in_place
from drlora_torch.models.quantization import checkpoints
from tests.torch import helpers, models
from tests.torch.conformance.test_merging import adapted


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_fails_half_way_restores_the_weights(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted("olmoe")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lora = adapter.layers["model.layers.1.mlp.experts"].lora
    delta_weight, calls = lora.delta_weight, []

    def fail_at_last(projection: str, expert: int) -> Tensor:
        calls.append(expert)
        if len(calls) == 12:
            raise MemoryError("no more")
        return delta_weight(projection, expert)

    monkeypatch.setattr(lora, "delta_weight", fail_at_last)
    with pytest.raises(MemoryError, match="no more"):
        adapter.merge(keep_originals=keep)
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in before.items())
    assert adapter.parameters()


def test_old_shards_stay_until_the_new_ones_are_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One I/O error while files are exchanged: the older checkpoint is there, whole."""
    model, adapter = adapted("olmoe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == "model.safetensors" and Path(target).parent == tmp_path:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(drlora_torch.CheckpointError, match=r"Input/output.* untouched"):
        adapter.merge_and_save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert len(before) > 3


def test_a_failure_while_writing_restores_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, adapter = adapted("olmoe")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    def fail_half_way(folder: str) -> None:
        (Path(folder) / "config.json").write_text("{}")
        fail()

    (tmp_path / "config.json").write_text("an older checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", fail_half_way)
        with pytest.raises(drlora_torch.CheckpointError, match="could not write a merged model"):
            adapter.merge_and_save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "an older checkpoint"
    lora = adapter.layers["model.layers.1.mlp.experts"].lora
    monkeypatch.setattr(lora, "delta_weight", fail)
    with pytest.raises(OSError, match="no space"):
        adapter.merge()
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in before.items())
    assert adapter.parameters()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("fails", ["remove", "show_trained"])
def test_a_merge_that_fails_after_writing_restores_the_weights(
    fails: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted("olmoe")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(*((Residents, fails) if fails == "remove" else (in_place, fails)), fail)
        with pytest.raises(MemoryError, match="no more"):
            adapter.merge(keep_originals=keep)
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in before.items())
    assert adapter.is_active
    adapter.merge()
    adapter.unmerge()
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in before.items())


def test_an_unmerge_that_was_interrupted_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = adapted("olmoe")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter.merge()
    weight, calls = in_place._weight, []

    def interrupt(*place: Any) -> Tensor:
        calls.append(place)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return weight(*place)

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_weight", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adapter.unmerge()
    adapter.unmerge()
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_written_model_runs_as_the_model_does(
    implementation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's grouped product takes no float64."""
    model = models.build("olmoe", torch.float64)
    model.set_experts_implementation(implementation)
    adapter = helpers.attach(model)
    helpers.uneven(adapter, scale=0.5)
    report = adapter.merge_and_save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    if implementation == "eager":
        assert report.logits_error is not None
        assert report.logits_error < 1e-6
    else:
        assert report.logits_error is None
        assert "was not run to compare it: the model does not run without" in caplog.text


def test_a_written_model_that_does_not_run_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, adapter = adapted("olmoe")
    reload = checkpoints.reload

    def no_head(model: Any, folder: Path) -> Any:
        written = reload(model, folder)
        written.lm_head = None
        return written

    monkeypatch.setattr(checkpoints, "reload", no_head)
    assert adapter.merge_and_save(tmp_path).logits_error is None
    assert "it does not run on the CPU" in caplog.text
