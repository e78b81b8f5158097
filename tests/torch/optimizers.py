"""The optimizers that tests train with, and their state as plain numbers, whatever stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import bitsandbytes
import pytest
import schedulefree
import torch
import torchao.optim
import transformers
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from tests.marks import slow_but

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
LAYOUTS = ["pooled", pytest.param("masked", marks=[pytest.mark.slow, pytest.mark.exhaustive])]
"""For tests of single rows, to which a layout is just another number of rows."""
BLOCK = 256  # of bitsandbytes


def _train(optimizer: Any) -> Optimizer:
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def hf_adafactor(parameters: Any, **options: Any) -> Optimizer:
    fixed = {"relative_step": False, "scale_parameter": False}
    return transformers.Adafactor(parameters, lr=1e-2, **fixed, **options)


TORCH: dict[str, Make] = {
    "adam": lambda p: Adam(p, lr=1e-2),
    "adam amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "nadam": lambda p: NAdam(p, lr=1e-2),
    "radam": lambda p: RAdam(p, lr=1e-2),
    "adamax": lambda p: Adamax(p, lr=1e-2),
    "adagrad": lambda p: Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: Adadelta(p, lr=1.0),
    "rmsprop centered": lambda p: RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "rprop": lambda p: Rprop(p, lr=1e-2),
    "sgd": lambda p: SGD(p, lr=1e-2),
    "sgd momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "asgd": lambda p: ASGD(p, lr=1e-2, t0=1),
    "adafactor": lambda p: Adafactor(p, lr=1e-2),
    "transformers adafactor": hf_adafactor,
    "transformers adafactor beta1": lambda p: hf_adafactor(p, beta1=0.9),
    "muon": lambda p: Muon(p, lr=1e-2),
}
SCHEDULE_FREE: dict[str, Make] = {
    "schedulefree adamw": lambda p: _train(schedulefree.AdamWScheduleFree(p, lr=1e-2)),
    "schedulefree radam": lambda p: _train(schedulefree.RAdamScheduleFree(p, lr=1e-2)),
    "schedulefree sgd": lambda p: _train(schedulefree.SGDScheduleFree(p, lr=1e-2)),
}
BITS32: dict[str, Make] = {
    "bitsandbytes adamw": lambda p: bitsandbytes.optim.AdamW32bit(p, lr=1e-2),
    "bitsandbytes lion": lambda p: bitsandbytes.optim.Lion32bit(p, lr=1e-3),
    "bitsandbytes ademamix": lambda p: bitsandbytes.optim.AdEMAMix(p, lr=1e-2),
}
BITS8: dict[str, Make] = {
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=BLOCK),
    "paged adamw8bit": lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=BLOCK),
    "lion8bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-3, min_8bit_size=BLOCK),
    "paged lion8bit": lambda p: bitsandbytes.optim.PagedLion8bit(p, lr=1e-3, min_8bit_size=BLOCK),
    "ademamix8bit": lambda p: bitsandbytes.optim.AdEMAMix8bit(p, lr=1e-2, min_8bit_size=BLOCK),
    "sgd8bit": lambda p: bitsandbytes.optim.SGD8bit(p, lr=1e-2, momentum=0.9, min_8bit_size=BLOCK),
    "rmsprop8bit": lambda p: bitsandbytes.optim.RMSprop8bit(p, lr=1e-3, min_8bit_size=BLOCK),
    "adagrad8bit": lambda p: bitsandbytes.optim.Adagrad8bit(p, lr=1e-2, min_8bit_size=BLOCK),
}
TORCHAO: dict[str, Make] = {
    "torchao adamw8bit": lambda p: torchao.optim.AdamW8bit(p, lr=1e-2),
    "torchao adam8bit": lambda p: torchao.optim.Adam8bit(p, lr=1e-2),
    "torchao adamw4bit": lambda p: torchao.optim.AdamW4bit(p, lr=1e-2, block_size=8),
    "torchao adamwfp8": lambda p: torchao.optim.AdamWFp8(p, lr=1e-2),
}
ALL: dict[str, Make] = {**TORCH, **SCHEDULE_FREE, **BITS32, **BITS8, **TORCHAO}
FAST = {
    *("adam amsgrad", "adamw", "adamw foreach", "adamw fused", "nadam", "rmsprop centered"),
    *("sgd momentum", "adafactor", "transformers adafactor beta1", "muon", "schedulefree adamw"),
    *("bitsandbytes ademamix", "adamw8bit", "sgd8bit", "torchao adamw4bit"),
}
"""Of each form of state one."""


def kinds(among: Iterable[str] = ALL) -> list[Any]:
    """Cases of a test: those of FAST, and the others as slow ones."""
    names = [name for name in ALL if name in set(among)]
    return slow_but(names, FAST & set(names))


def row_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """State of the rows of a parameter by key, decoded, with the rows first."""
    state = optimizer.state[parameter]
    found = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or "col" in key:
            continue
        if key.startswith(("qmap", "absmax")):
            continue
        if value.dtype == torch.uint8 and f"qmap{key[-1]}" in state:
            number = key[-1]
            found[key] = decode(value, state[f"qmap{number}"], state[f"absmax{number}"])
        elif hasattr(value, "dequantize") and type(value) is not Tensor:
            found[key] = value.dequantize()
        else:
            found[key] = value
    rows = parameter.shape[0]
    moved = {k: v if v.shape[0] == rows else v.movedim(1, 0) for k, v in found.items()}
    return {key: value.detach().clone() for key, value in moved.items()}


def decode(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """Values of 8-bit codes [P, F] or [2, P, F], blocks in the flattened parameter."""
    if absmax.dim() == 2:
        return torch.stack([decode(c, qmap, a) for c, a in zip(codes, absmax, strict=True)])
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return qmap[codes.long()] * scale
