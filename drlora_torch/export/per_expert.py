"""One LoRA per expert and projection, two-dimensional, under the names of unfused experts.

``{experts}.{i}.gate_proj.lora_A.weight`` [R, I], ``...lora_B.weight`` [O, R], likewise ``up_proj``
and ``down_proj``: what engines read that serve models with unfused expert names. A fused gate_up
projection is split by the layout that the module declares; both halves get the same A.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drlora_torch.errors import CheckpointError
from drlora_torch.export import scaling, writing
from drlora_torch.export.factors import Factors

if TYPE_CHECKING:
    from drlora_torch.adapter import AdaptedLayer

FUSED = "gate_up_proj"
KEY = re.compile(
    r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<projection>\w+)\.lora_(?P<part>[AB])\.weight"
)


def tensors(experts: nn.Module, name: str, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Two-dimensional tensors of one experts module."""
    named: dict[str, Tensor] = {}
    for projection, both in factors.items():
        for part, lora_B in _split(experts, projection, both.lora_B).items():
            for expert in range(lora_B.shape[0]):
                key = f"{name}.{expert}.{part}"
                named[f"{key}.lora_A.weight"] = both.lora_A[expert].clone()
                named[f"{key}.lora_B.weight"] = lora_B[expert].clone()
    return named


def target_modules(layers: Iterable[AdaptedLayer]) -> list[str]:
    """Names of the projections that were written."""
    fused = {projection for layer in layers for projection, _ in layer.lora.items()}
    return sorted({part for name in fused for part in part_names(name)})


def part_names(projection: str) -> tuple[str, ...]:
    """Unfused names of a projection."""
    return ("gate_proj", "up_proj") if projection == FUSED else (projection,)


def read(path: str | os.PathLike[str]) -> dict[str, dict[tuple[int, str], Tensor]]:
    """Weight changes of a directory in this naming, by experts module, expert and projection.

    Returns:
        ``alpha / r * B A`` [O, I] by the name of the experts module, then (expert, projection).

    Raises:
        CheckpointError: the directory is damaged, in another naming, or lacks one of A and B.
    """
    held, config = writing.read(Path(path))
    deltas: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key, lora_A in held.items():
        match = KEY.fullmatch(key)
        if match is None:
            if "lora_" in key:
                raise CheckpointError(f"{path}: {key!r} is not LoRA of one expert's projection")
            continue  # a router
        if match["part"] == "B":
            continue
        lora_B = held.get(key.replace(".lora_A.", ".lora_B."))
        if (
            lora_B is None
            or lora_A.dim() != 2
            or lora_B.dim() != 2
            or len(lora_A) != lora_B.shape[1]
        ):
            raise CheckpointError(f"{path}: {key!r} has no fitting lora_B")
        experts = match["experts"].removeprefix("base_model.model.")
        factor = scaling.of(config, f"{experts}.{match['expert']}.{match['projection']}")
        layer = deltas.setdefault(experts, {})
        layer[int(match["expert"]), match["projection"]] = factor * (lora_B @ lora_A)
    return deltas


def fuse(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Put rows of gate and up, [..., O, R] each, in the order of the module's fused weight."""
    if getattr(experts, "is_concatenated", True):
        return torch.cat([gate, up], dim=-2)
    return torch.stack([gate, up], dim=-2).flatten(-3, -2)


def _split(experts: Any, projection: str, lora_B: Tensor) -> dict[str, Tensor]:
    """B [N, O, R] by unfused name: halves, or every other row where gate and up interleave."""
    if projection != FUSED:
        return {projection: lora_B}
    if getattr(experts, "is_concatenated", True):
        gate, up = lora_B.chunk(2, dim=1)
    else:
        gate, up = lora_B[:, 0::2], lora_B[:, 1::2]
    return {"gate_proj": gate, "up_proj": up}
