"""Three steps of a large model with a growth event; its adapter goes to a file and back."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

import drlora_torch
from benchmarks.scale.building import Preset, build
from benchmarks.scale.meter import Meter
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.memory_forecast import MemoryForecast, RunOptions, forecast
from drlora_torch import Adapter
from drlora_torch.models.shapes import read_shape

STEPS = 3
LEARNING_RATE = 1e-3
WARM_UP = {
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run."""

    preset: Preset
    layers: int | None
    """How many of the model's layers; None: all."""
    options: RunOptions

    @property
    def config(self) -> Any:
        return self.preset.config(self.layers)

    @property
    def allocator(self) -> AllocatorConfig:
        """One event, after the second step."""
        ranks = {name: getattr(self.preset, name) for name in ("r_init", "r_target", "r_max")}
        return AllocatorConfig(**ranks, warmup_steps=1, growth_interval=1, growth_end=STEPS - 1)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes of the tensors of a run."""

    experts: int
    rest: int
    lora: int
    gradients: int
    optimizer: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found."""

    forecast: MemoryForecast
    parameters: int
    """Of the model."""
    parts: Parts
    meter: Meter
    losses: list[float]
    ranks: tuple[int, int, int]
    """Lowest rank of an expert after the event, highest, and their sum."""
    events: int
    same_logits: bool
    """Whether the loaded adapter gives the logits of the one that was saved, bit for bit."""
    effect: float
    """Largest difference that the adapter makes to a logit."""


def plan(job: Job) -> tuple[MemoryForecast, int]:
    """What ``drlora plan`` says of a job, and the parameters of the model."""
    with tempfile.TemporaryDirectory() as folder:
        job.config.save_pretrained(folder)
        shape = read_shape(folder)
    assert shape.total_parameters is not None
    return forecast(shape, job.allocator, job.options), shape.total_parameters


def warm_up(job: Job) -> None:
    """Run a tiny model of the same family, so that all libraries are loaded."""
    fields = {name: WARM_UP[name] for name in job.preset.fields if name in WARM_UP}
    preset = dataclasses.replace(job.preset, fields={**job.preset.fields, **fields})
    run(Job(preset, None, job.options))


def run(job: Job) -> Result:
    """Train, save, load and compare."""
    planned, parameters = plan(job)
    meter = Meter()
    with meter.stage("make the model"):
        model = build(job.config, job.options.quantization)
    experts = sum(layer.nbytes for layer in drlora_torch.discover(model))
    rest = sum(parameter.nbytes for parameter in model.parameters()) - experts
    with meter.stage("attach"):
        engine = AllocatorEngine(job.allocator)
        dtype = getattr(torch, job.options.lora_dtype)
        adapter = drlora_torch.attach(model, engine, dtype=dtype)
    if job.options.checkpointing:
        _checkpoint(model)
    words = _words(job)
    losses, gradients, optimizer = _train(model, adapter, words, meter)
    lora = sum(parameter.nbytes for parameter in adapter.parameters())
    every = torch.cat([torch.from_numpy(ranks) for ranks in adapter.ranks().values()])
    ranks = int(every.min()), int(every.max()), int(every.sum())
    events = len(adapter.events)
    same, effect = _save_and_load(model, adapter, words, meter)
    parts = Parts(experts, rest, lora, gradients, optimizer)
    return Result(planned, parameters, parts, meter, losses, ranks, events, same, effect)


def _words(job: Job) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (1, job.options.tokens)
    return torch.randint(0, job.config.vocab_size, size, generator=generator)


def _checkpoint(model: Any) -> None:
    """Turn on gradient checkpointing, which older versions of Transformers call otherwise."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def _train(
    model: Any, adapter: Adapter, words: Tensor, meter: Meter
) -> tuple[list[float], int, int]:
    """Take all steps; their losses, and the bytes of gradients and of the optimizer's state."""
    model.train()
    optimizer = AdamW(adapter.parameters(), lr=LEARNING_RATE, foreach=False)
    losses, gradients = [], 0
    for step in range(1, STEPS + 1):
        with meter.stage(f"step {step}"):
            loss = model(input_ids=words, labels=words).loss
            loss.backward()
            found = [p.grad for p in adapter.parameters() if p.grad is not None]
            gradients = sum(gradient.nbytes for gradient in found)
            del found
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            del loss
    values = [value for state in optimizer.state.values() for value in state.values()]
    return losses, gradients, sum(v.nbytes for v in values if isinstance(v, Tensor))


def _save_and_load(model: Any, adapter: Adapter, words: Tensor, meter: Meter) -> tuple[bool, float]:
    """Save the adapter and load it; whether logits are the same, and what they owe to it."""
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        with meter.stage("forward, without gradients"):
            before = _logits(model, words)
        with meter.stage("save the adapter"):
            adapter.save_pretrained(Path(folder))
        with meter.stage("detach"):
            adapter.detach()
        with meter.stage("load the adapter"):
            loaded = drlora_torch.load(model, folder)
    same = torch.equal(before, _logits(model, words))
    with loaded.disabled():
        effect = (before - _logits(model, words)).abs().max().item()
    loaded.detach()
    return same, effect


@torch.no_grad()
def _logits(model: Any, words: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=words).logits
    return logits.float()
