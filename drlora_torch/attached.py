"""The state of an adapter: plain data that every operation takes. No behaviour.

An adapter is *attached* (it has layers), *merged* (``merged`` is set: its layers are out of the
model and their weights hold W + s B A), or *gone* (no layers: detached, or merged for good).

Shape letters: P rank slots, I input and O output features.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_core import AllocatorEngine, GrowthEvent
from drlora_torch.lora.dense import DenseLoRA
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.slots import IntArray
from drlora_torch.models.records import MoELayer
from drlora_torch.options import AdapterOptions

ExpertWeight = tuple[str, str, int]
"""Layer name, projection, expert; of a Linear beside the experts: its name, ``weight``, 0."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """One experts module with its LoRA."""

    record: MoELayer
    experts: nn.Module
    lora: ExpertLoRA
    router: nn.Module | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AdaptedLinear:
    """One Linear that is no routed expert, with its LoRA."""

    linear: nn.Linear
    lora: DenseLoRA


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Original:
    """One weight as it was before merging."""

    values: Tensor  # [O, I], on the CPU
    written: int
    """Checksum of what was written in its place."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """What an adapter keeps while it is merged."""

    originals: dict[ExpertWeight, Original]
    stop_guard: Callable[[], None]
    step: int
    """Steps of the engine so far; it is free while the adapter is merged."""


@dataclasses.dataclass(eq=False)
class Attached:
    """Everything that is known of one adapter."""

    name: str
    model: nn.Module
    engine: AllocatorEngine
    options: AdapterOptions
    layers: dict[str, AdaptedLayer]
    """By name, in the order of the engine; empty once the adapter is gone."""
    ages: dict[str, IntArray]
    """Optimizer steps that each slot has lived [P], by layer; -1 for slots that are free, were
    there from the start, or need no correction any more. Call ``engine.settle()`` before."""
    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    """Modules of the base that learn whole (``modules_to_save``), by name."""
    dense: dict[str, AdaptedLinear] = dataclasses.field(default_factory=dict)
    """Linears of attention, shared experts and dense layers (``attention_rank``), by name."""
    process_group: Any = None
    """The processes that train the adapter together; None for all."""
    events: list[GrowthEvent] = dataclasses.field(default_factory=list)
    skipped_steps: int = 0
    """Of the steps that the engine has closed; call ``engine.settle()`` before."""
    known_steps: int = 0
    """Steps of the engine without the one that it waits for, while it does (``engine.pending``)."""
    enabled: bool = True
    """False inside ``disabled()``."""
    paused: bool = False
    """True inside ``paused()``."""
    trainable: bool = True
    """False after ``load(..., trainable=False)``."""
    trained_shown: bool = False
    """True while trained values of base parameters are in the model."""
    hidden_values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """The other values of base parameters that learn, by name: the base's, or the trained ones
    while not shown."""
    unfinished: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Partial state of the current optimizer step while the adapter is inactive."""
    optimizers: weakref.WeakSet[Optimizer] = dataclasses.field(default_factory=weakref.WeakSet)
    """Optimizers that have moved the LoRA, or are about to."""
    missed: list[tuple[nn.Parameter, IntArray]] = dataclasses.field(default_factory=list)
    """Slots that changed owner while none of ``optimizers`` held the parameter."""
    saved_by_peft: bool = False
    """True once a PeftModel around the model is known, which then saves the adapter too."""
    merged: Merged | None = None
    handle: object = None
    """The :class:`drlora_torch.Adapter` of this state, made by ``api``; operations ignore it."""
