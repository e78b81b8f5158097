"""One training of a tiny model, and what is recorded of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.lora import parts

ROWS, LENGTH, VOCABULARY, EXPERTS = 60, 5, 64, 8
"""Rows of the batch of an optimizer step: as many for any number of processes up to 6."""
RANKS = {"r_init": 2, "r_target": 4, "r_max": 8}
PRUNED = {"policy": "prune", "r_init": 6}
Model = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained; the same in one process and in many."""

    attach: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    micro: int = 1
    """Micro-batches of a step."""
    clip: bool = False
    scaler: bool = False
    share: float = 1.0
    """What a loss is multiplied with before its backward pass."""
    checkpointing: bool | None = None
    """Whether activation checkpointing is reentrant; None for none."""
    names: tuple[str, ...] = ("default",)
    """Adapters, which are trained one after the other."""

    @property
    def key(self) -> str:
        """What tells recipes apart."""
        return repr(self)


@dataclasses.dataclass(slots=True)
class Trace:
    """What a run did; arrays of all steps."""

    ranks: list[list[int]] = dataclasses.field(default_factory=list)
    """Ranks of all experts of all layers after each step."""
    samples: list[tuple[np.ndarray, np.ndarray, int]] = dataclasses.field(default_factory=list)
    """phi [N], s [N, R] and tokens of each layer in each step."""
    losses: list[float] = dataclasses.field(default_factory=list)
    parameters: list[Tensor] = dataclasses.field(default_factory=list)
    events: int = 0


class _Wide:
    """torch for the code of a model, with float64 where it says float32.

    Norms and routers convert to float32. There a difference of the last bit of float64 is rounded
    to one of 6e-8 now and then, in any two orders of summation.
    """

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_float64() -> None:
    """Let the norms and routers of OLMoE compute in float64 in this process."""
    from transformers.models.olmoe import modeling_olmoe

    vars(modeling_olmoe)["torch"] = _Wide()


def build_model() -> Model:
    """An OLMoE of two layers with 8 experts, of which the router chooses 2, in float64."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model.double().train()


def attach_all(
    model: Model, recipe: Recipe, steps: int, group: Any = None
) -> list[drlora_torch.Adapter]:
    """Attach the adapters of a recipe, with events in the first half of ``steps``."""
    window = {"warmup_steps": steps // 6, "growth_interval": max(steps // 12, 1)}
    window["growth_end"] = window["warmup_steps"] + 4 * window["growth_interval"]
    adapters = []
    for name in recipe.names:
        engine = AllocatorEngine(AllocatorConfig(**{**RANKS, **window, **recipe.config}))
        options = {"adapter_name": name, "process_group": group, **recipe.attach}
        adapters.append(drlora_torch.attach(model, engine, **options))
    if recipe.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recipe.checkpointing})
    return adapters


def make_batch(seed: int) -> Tensor:
    """Tokens of the whole batch of one micro-batch, [ROWS, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)


def train(
    parallel: Model,
    adapter: drlora_torch.Adapter,
    recipe: Recipe,
    rows: slice,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
    sync: Callable[[bool], contextlib.AbstractContextManager[None]] | None = None,
    whole: Callable[[float], float] = float,
) -> Trace:
    """Train on some rows of every batch.

    Args:
        parallel: the model in what spreads it.
        adapter: the active adapter.
        recipe: how.
        rows: those of this process.
        steps: numbers of the steps, which seed the batches.
        optimizer: default: a new AdamW.
        sync: from whether a micro-batch is the last one to a context for it.
        whole: from the loss of this process to that of all.
    """
    trace = Trace()
    stop = _follow(adapter.engine, trace)
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if recipe.scaler else None
    for step in steps:
        losses = []
        for micro in range(recipe.micro):
            ids = make_batch(100 * step + micro)[rows]
            with sync(micro == recipe.micro - 1) if sync else contextlib.nullcontext():
                loss = _loss(parallel, ids) / recipe.micro
                own = loss * recipe.share
                (own if scaler is None else scaler.scale(own)).backward()
            losses.append(loss.item())
        _step(adapter, recipe, optimizer, scaler)
        trace.losses.append(whole(sum(losses)))
        trace.ranks.append([r for layer in adapter.ranks().values() for r in layer.tolist()])
    stop()
    trace.parameters = [parts.whole(p).clone() for p in adapter.parameters()]
    trace.events = len(adapter.events)
    return trace


def _loss(parallel: Model, ids: Tensor) -> Tensor:
    """The mean over tokens, in float64; Transformers takes it in float32."""
    logits = parallel(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _step(
    adapter: drlora_torch.Adapter,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    if scaler is not None:
        scaler.unscale_(optimizer)
    if recipe.clip:
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.05)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if not adapter.options.auto_step:
        adapter.step()
    optimizer.zero_grad()


def _follow(engine: AllocatorEngine, trace: Trace) -> Callable[[], None]:
    """Keep what an engine is given; return what ends that."""
    inner = engine.observe_all

    def observe_all(*, routing: Any, importance: Any, tokens: Any) -> None:
        trace.samples.extend((routing[name], importance[name], tokens[name]) for name in routing)
        inner(routing=routing, importance=importance, tokens=tokens)

    vars(engine)["observe_all"] = observe_all
    return lambda: vars(engine).pop("observe_all")


def mean_over_processes(value: float) -> float:
    """The mean of a number over all processes."""
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


@contextlib.contextmanager
def without_sync(parallel: DistributedDataParallel, last: bool) -> Iterator[None]:
    """Accumulate without an exchange but in the last micro-batch."""
    with contextlib.nullcontext() if last else parallel.no_sync():
        yield


@contextlib.contextmanager
def without_reduction(model: Model, last: bool) -> Iterator[None]:
    """The same for ``fully_shard``."""
    model.set_requires_gradient_sync(last)
    yield
