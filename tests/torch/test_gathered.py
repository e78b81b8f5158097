"""``attach`` on a model whose parameters ``fully_shard`` has left gathered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard

from tests.torch import helpers, models
from tests.torch.launches import launches


def worker(rank: int, folder: str) -> None:
    """Shard the parts that Transformers shards, use the model, and attach."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1
    )
    model: Any = models.build()
    for part in (*model.model.layers, model.model.norm, model):
        fully_shard(part, reshard_after_forward=False)
    with torch.no_grad():
        model(input_ids=models.tokens(2, 5, 0))
    adapter = helpers.attach(model)
    ours = {id(parameter) for parameter in adapter.parameters()}
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    Path(folder, "left").write_text(" ".join(left))
    os._exit(0)  # as in test_distributed


@launches
def test_attach_freezes_the_parameters_that_processes_hold(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=1)
    assert (tmp_path / "left").read_text() == ""
