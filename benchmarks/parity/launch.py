"""Several processes of this machine for one job."""

from __future__ import annotations

import datetime
import faulthandler
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from benchmarks.parity import training

Job = Callable[[Path, Any], Any]
"""From a folder, with the saved ``model`` in it, and a group of this process alone to a result."""


def launch(world: int, job: Job) -> Any:
    """Run a job in ``world`` processes at once; the result of the first one.

    A job goes by pickle: it is a function of a module, or a ``functools.partial`` of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        training.build_model().save_pretrained(Path(folder) / "model")
        multiprocessing.spawn(_work, (folder, world, job), nprocs=world)
        return torch.load(Path(folder) / "found.pt", weights_only=False)


def _work(rank: int, folder: str, world: int, job: Job) -> None:
    faulthandler.enable()  # threads of gloo have crashed
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=5),
    )
    alone = [distributed.new_group([each]) for each in range(world)][rank]
    training.compute_in_float64()
    found = job(Path(folder), alone)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    distributed.barrier()
    # Not destroy_process_group: torch then joins a gloo thread while it holds the lock of the
    # interpreter, which that thread may need to free a tensor, and both wait for ever.
    os._exit(0)
