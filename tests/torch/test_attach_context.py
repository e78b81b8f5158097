"""``attach`` and ``load`` where the LoRA could not be trained or recorded: nothing is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drlora_torch
from drlora_core import LayoutError
from tests.torch import helpers, models


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS: dict[str, Any] = {
    "inference_mode": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_that_spoils_new_parameters_is_refused(context: Any, tmp_path: Path) -> None:
    helpers.attach(models.build()).save_pretrained(tmp_path)
    model, engine = models.build(), helpers.engine()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with context(), pytest.raises(drlora_torch.AttachError, match="call them outside of"):
        drlora_torch.attach(model, engine)
    with context(), pytest.raises(drlora_torch.AttachError, match="call them outside of"):
        drlora_torch.load(model, tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not engine.layer_names
    with torch.no_grad():
        adapter = drlora_torch.attach(model, engine)
    helpers.step(model, helpers.adamw(adapter))
    assert engine.step_count == 1


@pytest.mark.parametrize("below", ["", "run", "runs/a"])
def test_a_recording_where_no_folder_can_be_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, engine = models.build(), helpers.engine()
    with pytest.raises(LayoutError, match="file' is a file; choose another path"):
        drlora_torch.attach(model, engine, record=tmp_path / "file" / below)
    assert not drlora_torch.adapters(model)
    assert not engine.layer_names
    adapter = drlora_torch.attach(model, engine, record=tmp_path / "run")
    helpers.step(model, helpers.adamw(adapter))
    with pytest.raises(LayoutError, match="file' is a file; choose another path"):
        engine.record_to(tmp_path / "file" / below)
    engine.record_to(None)
    assert list((tmp_path / "run").iterdir())
