"""A model that is run with other tensors than its own, or has lost them on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import drlora_torch
from tests.torch import helpers, models


def test_a_functional_call_that_would_be_trained_is_refused() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.raises(drlora_torch.AttachError, match="functional_call"):
        functional_call(model, copies, (), helpers.batch())
    with torch.no_grad():
        functional_call(model, copies, (), helpers.batch())
    with adapter.paused():
        functional_call(model, copies, (), helpers.batch()).loss.backward()
    helpers.step(model, optimizer)
    assert (adapter.engine.step_count, adapter.skipped_steps) == (1, 0)


def test_gradients_that_went_to_copies_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Copies that are parameters look like those of ``fully_shard`` until backward is over."""
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    for seed in range(2):
        functional_call(model, copies, (), helpers.batch(seed)).loss.backward()
        optimizer.step()
    assert caplog.text.count("left no gradient on the LoRA") == 1
    for seed in range(2):
        model(**helpers.batch(seed)).loss.backward()
        optimizer.zero_grad()  # a dropped batch is the user's own
        optimizer.step()
    assert caplog.text.count("left no gradient on the LoRA") == 1
    assert adapter.engine.step_count == 0


def test_a_model_on_the_meta_device_neither_runs_nor_replaces_a_file(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    adapter.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model.to("meta")
    with pytest.raises(drlora_torch.ModelError, match="'meta', which holds no values"):
        model(models.tokens())
    with pytest.raises(drlora_torch.CheckpointError, match="meta device, which loses the LoRA"):
        adapter.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
