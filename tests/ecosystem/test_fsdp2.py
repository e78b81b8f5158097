"""FSDP 2 as Accelerate and the Trainer set it up: training, checkpoints and saves of two processes.

Accelerate has FSDP for GPUs only; a shim lets it prepare a model on CPUs.
"""

from __future__ import annotations

import datetime
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

pytest.importorskip("accelerate")

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import multiprocessing
from transformers import Trainer, TrainingArguments

import drlora_torch
from drlora_torch.integrations.trainer import DRLoRACallback
from drlora_torch.lora import parts
from tests.torch import helpers, models
from tests.torch.launches import launches

STATE_DICTS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
HALF, STEPS = 6, 12


def make_plugin(state_dict_type: str) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["OlmoeDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type=state_dict_type,
    )


class OnCPU:
    """Accelerate takes CPUs for devices that FSDP may use."""

    state_dict_type = STATE_DICTS[0]

    def __init__(self) -> None:
        inner = Accelerator.__init__

        def init(accelerator: Any, *args: Any, **kwargs: Any) -> None:
            inner(accelerator, *args, **kwargs)
            accelerator.state.fsdp_plugin = make_plugin(self.state_dict_type)

        kinds: tuple[Any, Any] = Accelerator, AcceleratorState
        kinds[0].__init__ = init
        kinds[0].distributed_type = property(lambda self: DistributedType.FSDP)
        kinds[0].is_fsdp2 = kinds[1].is_fsdp2 = True


def build(**options: Any) -> tuple[Any, drlora_torch.Adapter]:
    model = models.build(dtype=torch.float64)
    model.set_experts_implementation("eager")
    return model, helpers.attach(model, router="after_warmup", **options)


def state(adapter: drlora_torch.Adapter) -> tuple[dict[str, list[int]], list[torch.Tensor]]:
    values = [parts.whole(parameter).clone() for parameter in adapter.parameters()]
    return helpers.rank_history(adapter), values


def by_accelerate(folder: Path, alone: Any) -> dict[str, Any]:
    """A loop of one's own, with ``save_state`` in the middle and ``save_pretrained`` at the end."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index

    def train(model: Any, optimizer: Any, rows: slice, steps: range) -> None:
        for seed in steps:
            ids = models.tokens(4, 7, seed)[rows]
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()

    model, whole = build(process_group=alone)
    train(model, helpers.adamw(whole), slice(0, 4), range(STEPS))
    model, adapter = build()
    parallel, optimizer = accelerator.prepare(model, helpers.adamw(adapter))
    rows = slice(2 * rank, 2 * rank + 2)
    train(parallel, optimizer, rows, range(HALF))
    accelerator.save_state(str(folder / "state"))
    train(parallel, optimizer, rows, range(HALF, STEPS))
    straight = state(adapter)
    accelerator.load_state(str(folder / "state"))
    steps = adapter.engine.step_count
    train(parallel, optimizer, rows, range(HALF, STEPS))
    accelerator.unwrap_model(parallel).save_pretrained(
        folder / "saved",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(parallel),
    )
    return {
        "alone": state(whole),
        "straight": straight,
        "steps": steps,
        "resumed": state(adapter),
        "sharded": adapter.is_sharded,
    }


def by_trainer(folder: Path, *, callback: bool) -> dict[str, Any]:
    def trainer() -> tuple[Trainer, drlora_torch.Adapter]:
        model, adapter = build()
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=STEPS,
            save_steps=HALF,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [models.tokens(1, 7, seed)[0] for seed in range(64)]
        data = [{"input_ids": row, "labels": row} for row in rows]
        callbacks: list[Any] = [DRLoRACallback(adapter)] if callback else []
        return Trainer(model, arguments, train_dataset=data, callbacks=callbacks), adapter

    first, adapter = trainer()
    first.train()
    straight = state(adapter)
    second, resumed = trainer()
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
    return {
        "straight": straight,
        "resumed": state(resumed),
        "sharded": adapter.is_sharded,
        "events": len(adapter.events),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=2),
    )
    alone = [torch.distributed.new_group([each]) for each in range(2)][rank]
    shim = OnCPU()
    found = {"accelerate": by_accelerate(Path(folder), alone)}
    for kind in STATE_DICTS:
        shim.state_dict_type = kind
        for callback in (True, False):
            name = f"{kind} {callback}"
            found[name] = by_trainer(Path(folder) / name, callback=callback)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


def same(one: Any, other: Any) -> bool:
    """Equal ranks and values, bit for bit."""
    pairs = zip(one[1], other[1], strict=True)
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in pairs)


@launches
def test_accelerate_and_trainer_with_fsdp2(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        own = found.pop("accelerate")
        assert own["sharded"]
        assert own["steps"] == HALF
        assert own["straight"][0] == own["alone"][0]
        for mine, theirs in zip(own["straight"][1], own["alone"][1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        assert same(own["straight"], own["resumed"])
        loaded = drlora_torch.load(models.build(dtype=torch.float64), tmp_path / "saved")
        assert same(own["resumed"], state(loaded))
        for name, run in found.items():
            assert run["sharded"], name
            assert run["events"] == 2, name
            assert same(run["straight"], run["resumed"]), name
