"""Two processes with half of the batch each decide as one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.torch import helpers, models
from tests.torch.helpers import Spy

STEPS = 7


def run(model: Any, adapter: Any, rows: slice, auto_step: bool) -> dict[str, Any]:
    """Train on some rows of every batch; two micro-batches a step."""
    spy = Spy(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for seed in range(STEPS):
        for micro in range(2):
            ids = models.tokens(4, 7, 10 * seed + micro)[rows]
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        optimizer.step()
        if not auto_step:
            adapter.step()
        optimizer.zero_grad()
    return {
        "ranks": helpers.rank_history(adapter),
        "samples": [
            {
                name: (torch.from_numpy(phi), torch.from_numpy(s), t)
                for name, (phi, s, t) in d.items()
            }
            for d in spy.samples
        ],
        "parameters": [p.detach() for p in adapter.parameters()],
    }


def worker(rank: int, folder: str, auto_step: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = models.build(dtype=torch.float64)
    adapter = helpers.attach(model, auto_step=auto_step)
    parallel = DistributedDataParallel(model)
    torch.save(
        run(parallel, adapter, slice(2 * rank, 2 * rank + 2), auto_step), f"{folder}/{rank}.pt"
    )
    torch.distributed.barrier()
    # Not destroy_process_group: torch then joins a gloo thread while it holds the lock of the
    # interpreter, which that thread may need to free a tensor, and both wait for ever.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("auto_step", [True, False])
def test_two_processes_decide_as_one(tmp_path: Path, auto_step: bool) -> None:
    multiprocessing.spawn(worker, (str(tmp_path), auto_step), nprocs=2)
    model = models.build(dtype=torch.float64)
    adapter = helpers.attach(model, auto_step=auto_step)
    alone = run(model, adapter, slice(0, 4), auto_step)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["ranks"] == second["ranks"] == alone["ranks"]
    assert len({tuple(ranks) for ranks in alone["ranks"].values()} | {(4,) * 8}) > 1  # uneven
    for mine, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(mine, theirs)
    for mine, whole in zip(first["parameters"], alone["parameters"], strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)  # float32 norms and routers
    for one, other, whole in zip(
        first["samples"], second["samples"], alone["samples"], strict=True
    ):
        for name, (phi, s, tokens) in whole.items():
            assert torch.equal(one[name][0], other[name][0])
            assert torch.equal(one[name][1], other[name][1])
            assert one[name][2] == other[name][2] == tokens == 2 * 4 * 7
            torch.testing.assert_close(one[name][0], phi, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one[name][1], s, rtol=1e-4, atol=1e-9)
