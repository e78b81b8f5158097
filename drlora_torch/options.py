"""Options of :func:`drlora_torch.attach`, validated once and saved with the adapter."""

from __future__ import annotations

import enum
import math
from typing import Annotated, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from drlora_core import AllocatorConfig
from drlora_core.bounds import ALPHA_BOUND, RANK_BOUND
from drlora_core.errors import near_misses
from drlora_core.validation import reword_errors
from drlora_torch.lora.kernels import Kernel
from drlora_torch.lora.slots import Layout
from drlora_torch.signals import (
    SENSITIVITY,
    WEIGHT,
    Importance,
    Routing,
    choose_importance,
    choose_routing,
)


def _name_of(signal: Importance | Routing) -> str:
    """The name of a signal; older pydantic takes no type as a serializer."""
    return str(signal)


Names = Annotated[tuple[str, ...], Field(min_length=1)]
ByName = PlainSerializer(_name_of, return_type=str)
"""Files hold the name of a signal, and of a callable no more than that."""
FLOATING = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class RouterMode(str, enum.Enum):
    """Whether the routers of the adapted layers learn."""

    FROZEN = "frozen"
    AFTER_WARMUP = "after_warmup"
    """Frozen for ``warmup_steps`` optimizer steps, then trained."""
    TRAINABLE = "trainable"


class Newborn(str, enum.Enum):
    """How newborn rank dimensions meet an optimizer that has run for many steps."""

    CORRECTED = "corrected"
    """They move as if their own step count had just begun: under Adam, AdamW, Adamax, RAdam,
    Adafactor, schedule-free optimizers, and the Adam of bitsandbytes and torchao. Lion, SGD,
    RMSprop, Adagrad, Adadelta and Rprop need no correction. There is none for Muon, NAdam,
    AdEMAMix, LAMB, LARS and optimizers that drlora does not know; a warning is logged once."""
    PLAIN = "plain"
    """The optimizer is left alone."""


class AdapterOptions(BaseModel):
    """How the LoRA of the experts is built; see :func:`drlora_torch.attach` for each option."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    alpha: Annotated[float, ALPHA_BOUND] = Field(gt=0.0)
    targets: Names | None = None
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    router: RouterMode = RouterMode.FROZEN
    layout: Layout = Layout.POOLED
    dtype: str | None = None
    layers: Names | None = None
    modules_to_save: Names | None = None
    attention_rank: Annotated[int | None, RANK_BOUND] = Field(None, ge=1, strict=True)
    attention_alpha: Annotated[float | None, ALPHA_BOUND] = Field(None, gt=0.0)
    attention_targets: Names | None = None
    auto_step: bool = True
    newborn: Newborn = Newborn.CORRECTED
    rslora: bool = False
    kernel: Kernel = Kernel.AUTO
    importance: Annotated[Importance, PlainValidator(choose_importance), ByName] = SENSITIVITY
    routing: Annotated[Routing, PlainValidator(choose_routing), ByName] = WEIGHT

    @field_validator("targets", "layers", "modules_to_save", "attention_targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_name(cls, value: object) -> object:
        name = str(value).removeprefix("torch.")
        if value is not None and name not in FLOATING:
            raise ValueError(
                f"{value!r} is not a floating-point dtype; {near_misses(name, FLOATING)}"
            )
        return None if value is None else name

    @model_validator(mode="after")
    def _rank_of_linears(self) -> Self:
        for name in ("attention_alpha", "attention_targets"):
            if self.attention_rank is None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs attention_rank: the rank of the LoRA of "
                    "the Linears, such as 8"
                )
        return self

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    def scaling(self, config: AllocatorConfig) -> float:
        """s = alpha / r_target, or alpha / sqrt(r_target) with ``rslora``; never changes."""
        divisor = math.sqrt(config.r_target) if self.rslora else config.r_target
        return self.alpha / divisor

    def attention_scaling(self) -> float:
        """s of the Linears: alpha / rank, or alpha / sqrt(rank) with ``rslora``; default 2 R."""
        assert self.attention_rank is not None
        alpha = 2.0 * self.attention_rank if self.attention_alpha is None else self.attention_alpha
        return alpha / (math.sqrt(self.attention_rank) if self.rslora else self.attention_rank)

    def lora_dtype(self, base: torch.dtype) -> torch.dtype:
        """Return the dtype of the LoRA parameters: the one asked for, else at least float32."""
        if self.dtype is not None:
            return FLOATING[self.dtype]
        return torch.float32 if base.itemsize < 4 else base

    def slots_per_expert(self, config: AllocatorConfig) -> int:
        """P / N: r_max with layout ``masked``, else the budget's mean rank."""
        return config.r_max if self.layout is Layout.MASKED else config.mean_rank_ceiling
