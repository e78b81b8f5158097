"""Packed experts in two processes: the ranks and losses of one process."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import drlora_torch
from drlora_torch.errors import AttachError
from tests.torch import helpers, models
from tests.torch.launches import launches

STEPS = range(5)
WAYS = ("ddp", "fully_shard after", "fully_shard before")


def train(model: Any, adapter: drlora_torch.Adapter, rows: slice) -> list[float]:
    optimizer, losses = helpers.adamw(adapter), []
    for seed in STEPS:
        ids = models.tokens(4, 7, seed)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build() -> Any:
    model = models.build("qwen3_moe")
    drlora_torch.quantize_experts(model)
    return model


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=2),
    )
    results = {}
    for way in WAYS:
        model: Any = build()
        if way == "fully_shard before":
            shard(model)
        adapter = helpers.attach(model)
        if way == "fully_shard after":
            shard(model)
        forward = DistributedDataParallel(model) if way == "ddp" else model
        losses = train(forward, adapter, slice(2 * rank, 2 * rank + 2))
        if way != "ddp" or rank == 0:
            adapter.save_pretrained(folder / way)
        results[way] = losses, helpers.rank_history(adapter)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    # Not destroy_process_group: gloo's threads may end the process with it (SIGABRT), or hang.
    os._exit(0)


@launches
def test_two_processes_decide_as_one(tmp_path: Path) -> None:
    model = build()
    adapter = helpers.attach(model)
    losses, ranks = train(model, adapter, slice(None)), helpers.rank_history(adapter)
    adapter.detach()
    multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for way in WAYS:
        means = [(a + b) / 2 for a, b in zip(first[way][0], second[way][0], strict=True)]
        assert means == pytest.approx(losses, rel=1e-6)
        assert first[way][1] == second[way][1] == ranks
        again = build()
        loaded = drlora_torch.load(again, tmp_path / way)
        assert helpers.rank_history(loaded) == ranks


def test_experts_that_transformers_has_spread_are_refused() -> None:
    model = build()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(AttachError, match=r"packed \(nf4\).*fully_shard"):
        helpers.attach(model)
