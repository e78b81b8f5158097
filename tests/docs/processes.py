"""What eight processes do with the programs of docs/distributed.md, for test_processes.py."""

from __future__ import annotations

import datetime
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import drlora_torch
from drlora_core import AllocatorEngine
from tests.docs import fragments, pages
from tests.torch import models

PROCESSES, STEPS = 8, 2


def programs() -> list[str]:
    """The blocks of the page that spread a model over processes."""
    blocks = re.findall(r"```python\n(.*?)```", pages.read("docs/distributed.md"), flags=re.S)
    return [block for block in blocks if "fully_shard(" in block or "DistributedConfig(" in block]


def train(program: str, name: str) -> dict[str, Any]:
    """Run a program of the page and train with what it made, each process on a row of its own."""
    names: dict[str, Any] = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "DistributedConfig": DistributedConfig,
        "drlora_torch": drlora_torch,
        "engine": AllocatorEngine(fragments.CONFIG),
        "fully_shard": fully_shard,
        "name": name,
        "torch": torch,
    }
    exec(program, names)
    model, adapter, optimizer = names["model"], names["adapter"], names["optimizer"]
    for seed in range(STEPS):
        ids = models.tokens(PROCESSES, 7, seed)[[torch.distributed.get_rank()]]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "sharded": adapter.is_sharded,
        "skipped": adapter.skipped_steps,
        "ranks": {layer: ranks.tolist() for layer, ranks in adapter.ranks().items()},
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=120),
    )
    said = [train(program, f"{folder}/model") for program in programs()]
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    os._exit(0)
