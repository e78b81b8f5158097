"""The real DeepSpeed, on two processes: what it would train wrongly is refused, stage 0 trains."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import drlora_torch
from tests.torch import helpers, models
from tests.torch.helpers import Spy
from tests.torch.launches import launches

STEPS = 7
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
REFUSED: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_optimization": {"stage": 1}},
    "ZeRO-2": {"zero_optimization": {"stage": 2}},
    "ZeRO-3": {"zero_optimization": {"stage": 3}},
    "ZeRO-1, DeepSpeed's Adam": {"zero_optimization": {"stage": 1}, "optimizer": ADAM},
    "ZeRO-1, bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "stage 0, bf16": {"bf16": {"enabled": True}},
}
TRAINERS = [(0, True), (1, True), (3, False)]
"""ZeRO stages, and whether the Trainer has the callback."""
Train = Callable[[Any, torch.Tensor, bool], None]


def initialize(model: Any, parameters: Any, changes: dict[str, Any]) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        **changes,
    }
    if "bf16" in changes:
        model.bfloat16()
    if "optimizer" in changes:
        return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def refused(rows: slice, changes: dict[str, Any], around: bool) -> str:
    """What the first step says; ``around``: the model is called without the engine."""
    model = models.build()
    adapter = helpers.attach(model)
    engine = initialize(model, adapter.parameters(), changes)
    ids = models.tokens(4, 7, 0)[rows]
    at = "forward"
    try:
        loss = (model if around else engine)(input_ids=ids, labels=ids).loss
        at = "step"
        engine.backward(loss)
        engine.step()
    except drlora_torch.AttachError as error:
        return f"{at}: {error}"
    return f"nothing, with {adapter.engine.step_count} steps seen"


def too_late(changes: dict[str, Any]) -> str:
    """What ``attach`` says after ``deepspeed.initialize``, of the engine and of the model."""
    model = models.build()
    engine = initialize(model, model.parameters(), changes)
    said = []
    for each in (engine, model):
        try:
            helpers.attach(each)
        except drlora_torch.AttachError as error:
            said.append(str(error).splitlines()[0])
    return "\n".join(said)


def with_engine(model: Any, adapter: Any) -> Train:
    engine = initialize(model, adapter.parameters(), {"gradient_accumulation_steps": 2})

    def train(ids: torch.Tensor, last: bool) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return train


def with_ddp(model: Any, adapter: Any) -> Train:
    parallel, optimizer = DistributedDataParallel(model), helpers.adamw(adapter)

    def train(ids: torch.Tensor, last: bool) -> None:
        (parallel(input_ids=ids, labels=ids).loss / 2).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return train


def trained(rows: slice, make: Callable[[Any, Any], Train]) -> dict[str, Any]:
    model = models.build()
    adapter = helpers.attach(model)
    spy, train = Spy(adapter), make(model, adapter)
    for seed in range(STEPS):
        for micro in range(2):
            train(models.tokens(4, 7, 10 * seed + micro)[rows], micro == 1)
    return {
        "ranks": helpers.rank_history(adapter),
        "events": len(adapter.events),
        "tokens": [[tokens for _, _, tokens in each.values()] for each in spy.samples],
        "importance": [torch.from_numpy(s) for each in spy.samples for _, s, _ in each.values()],
        "parameters": [p.detach().clone() for p in adapter.parameters()],
    }


def by_trainer(folder: str, stage: int, with_callback: bool) -> str:
    """What a Trainer says that is given a config of DeepSpeed."""
    from transformers import Trainer, TrainingArguments

    from drlora_torch.integrations.trainer import DRLoRACallback

    args = TrainingArguments(
        f"{folder}/trainer",
        deepspeed={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = models.build()
    adapter = helpers.attach(model)
    callbacks = [DRLoRACallback(adapter)] if with_callback else []
    data = [{"input_ids": ids, "labels": ids} for ids in models.tokens(8, 7)]
    try:
        Trainer(model, args, train_dataset=data, callbacks=callbacks).train()  # type: ignore[arg-type]
    except drlora_torch.AttachError as error:
        return str(error)
    return f"{adapter.engine.step_count} steps seen"


def worker(rank: int, folder: str, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    rows = slice(2 * rank, 2 * rank + 2)
    said = {name: refused(rows, changes, False) for name, changes in REFUSED.items()}
    said["around"] = refused(rows, REFUSED["stage 0, bf16"], True)
    late = {stage: too_late({"zero_optimization": {"stage": stage}}) for stage in range(4)}
    ends = {"engine": trained(rows, with_engine), "ddp": trained(rows, with_ddp)}
    trainer = {case: by_trainer(folder, *case) for case in TRAINERS}
    torch.save((said, late, trainer, ends), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # as in test_distributed.py


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@launches
def test_deepspeed_on_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    multiprocessing.spawn(worker, (str(tmp_path), free_port()), nprocs=2)
    (*first, ends), (*second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second  # every process says the same
    said, late, trainer = first
    assert said.pop("around").startswith("step: DeepSpeed steps the model with its FP16_")
    for name, text in said.items():
        assert text.startswith("forward: DeepSpeed "), name
        assert "right:\n    adapter = attach(model, engine)" in text
    for stage, text in late.items():
        engine, model = text.splitlines()
        assert "wrapped in DeepSpeedEngine already" in engine, stage
        assert "DeepSpeed (ZeRO" in model or "initialize was called on the model" in model, stage
    for (stage, with_callback), text in trainer.items():
        wanted = "DeepSpeed " if stage else "2 steps seen"
        assert text.startswith(wanted), (stage, with_callback)
    engine, ddp = ends["engine"], ends["ddp"]
    assert engine["events"] == ddp["events"] > 0
    assert engine["tokens"] == ddp["tokens"] == [[2 * 4 * 7] * 2] * STEPS
    assert engine["ranks"] == ddp["ranks"]
    for kind in ("importance", "parameters"):
        torch.testing.assert_close(engine[kind], ddp[kind], rtol=1e-4, atol=1e-6)
        for mine, theirs in zip(engine[kind], other["engine"][kind], strict=True):
            assert torch.equal(mine, theirs)
