"""What would not train in several processes, or train apart, says so in all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import multiprocessing
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import drlora_torch
from tests.torch import helpers, models
from tests.torch.launches import launches


def uneven(said: dict[str, str], rank: int, rows: slice) -> None:
    """More steps on one process than on the other, inside ``join``."""
    model = models.build()
    adapter = helpers.attach(model)
    optimizer, parallel = helpers.adamw(adapter), DistributedDataParallel(model)
    try:
        with parallel.join():
            for step in range(1 + rank):
                said["join"] = f"step {step + 1}: "
                ids = models.tokens(4, 7, step)[rows]
                parallel(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
    except drlora_torch.AttachError as error:
        said["join"] += str(error)
    optimizer.zero_grad()
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        ids = models.tokens(4, 7, 0)[rows]
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said["steps without join"] = str(adapter.engine.step_count)


class Logits(torch.nn.Module):
    """A model as a stage of a pipeline: tensors in, tensors out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(input_ids=ids).logits


def pipeline(said: dict[str, str]) -> None:
    """A pipeline, here of a single stage, before and after ``attach``."""
    model = models.build()
    adapter = helpers.attach(model)
    group, _ = torch.distributed.new_subgroups(1)
    stage = PipelineStage(Logits(model), 0, 1, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, 1, loss_fn=lambda logits, ids: logits.sum() * ids.sum())
    ids = models.tokens(4, 7, 0)
    attempts: dict[str, Callable[[], object]] = {
        "pipeline": lambda: schedule.step(ids, target=ids),
        "stage": lambda: helpers.attach(stage),  # type: ignore[arg-type]
    }
    for name, attempt in attempts.items():
        said[name] = ""
        try:
            attempt()
        except drlora_torch.AttachError as error:
            said[name] = str(error)
    said["steps in a pipeline"] = str(adapter.engine.step_count)


def apart(rank: int, folder: str, compiled: bool) -> None:
    """What the processes of a run say that is wrapped in the wrong order, or not at all."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    said: dict[str, str] = {}
    rows = slice(2 * rank, 2 * rank + 2)

    def attempt(name: str, wrapped: Any, adapter: Any, steps: int, auto_step: bool = True) -> None:
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        said[name] = ""
        for step in range(steps):
            ids = models.tokens(4, 7, step)[rows]
            wrapped(input_ids=ids, labels=ids).loss.backward()
            try:
                optimizer.step()
                if not auto_step:
                    adapter.step()
            except drlora_torch.AttachError as error:
                said[name] = f"step {step + 1}: {error}"
                return
            optimizer.zero_grad()

    model = models.build()
    parallel = DistributedDataParallel(model)
    try:
        helpers.attach(parallel)
    except drlora_torch.AttachError as error:
        said["wrapper"] = str(error)
    attempt("inside", parallel, helpers.attach(model), steps=1)
    alone = models.build()
    attempt("alone", alone, helpers.attach(alone), steps=1)
    by_hand = models.build()
    adapter = helpers.attach(by_hand, auto_step=False)
    attempt("auto_step=False", by_hand, adapter, steps=1, auto_step=False)
    both = models.build()
    first = helpers.attach(both, adapter_name="first")
    parallel = DistributedDataParallel(both)
    second = helpers.attach(both, adapter_name="second")
    attempt("second adapter", parallel, second, steps=1)
    first.activate()
    attempt("first adapter", parallel, first, steps=3)
    model = models.build()
    adapter = helpers.attach(model)
    inner = torch.compile(model, backend="eager") if compiled else model
    parallel = DistributedDataParallel(inner)
    attempt("compiled" if compiled else "right order", parallel, adapter, steps=3)
    found = drlora_torch.adapters(parallel)
    said["found"] = "" if found == {"default": adapter} else str(found)
    uneven(said, rank, rows)
    pipeline(said)
    torch.save(said, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


@launches
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_processes_that_train_apart_all_raise_at_the_first_step(
    tmp_path: Path, compiled: bool
) -> None:
    multiprocessing.spawn(apart, (str(tmp_path), compiled), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert "wrapped in DistributedDataParallel already" in first.pop("wrapper")
    assert first.pop("join").startswith(
        "step 1: the model runs inside DistributedDataParallel.join"
    )
    assert first.pop("steps without join") == "2"
    assert "runs in a pipeline (torch.distributed.pipelining.stage)" in first.pop("pipeline")
    assert "wrapped in PipelineStage already" in first.pop("stage")
    assert first.pop("steps in a pipeline") == "0"
    right = {"first adapter", "right order", "compiled", "found"}
    assert {name: text for name, text in first.items() if text and name in right} == {}
    for name in first.keys() - right:
        assert first[name].startswith("step 1: the processes train apart"), name
        assert "right:\n    adapter = attach(model, engine)" in first[name]
