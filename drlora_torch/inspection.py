"""Output of ``drlora inspect``: the MoE layers of a model, their bytes, and the size of their LoRA.

The model may be on the meta device.
Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from torch import nn

from drlora_core.cli.common import format_bytes
from drlora_core.cli.console import say
from drlora_core.cli.tables import show_table
from drlora_torch.models.counting import count_bytes, count_parameters
from drlora_torch.models.discovery import find_layers
from drlora_torch.models.records import MoELayer


def lora_parameters(layer: MoELayer, rank: int) -> int:
    """Return N r (in + out), summed over the projections of a layer; r is the mean rank."""
    per_dimension = sum(s.in_features + s.out_features for s in layer.projections.values())
    return layer.num_experts * rank * per_dimension


def inspect(model: nn.Module, rank: int) -> list[dict[str, Any]]:
    """Return the records of :func:`drlora_torch.discover` as dicts, with the size of their LoRA."""
    return [
        {**dataclasses.asdict(layer), "lora_parameters": lora_parameters(layer, rank)}
        for layer in find_layers(model, on_meta=True)
    ]


def show(title: str, model: nn.Module, rank: int, console: Console) -> None:
    """Print the layers as a table, one row per kind of layer, and the total size of the LoRA."""
    layers = find_layers(model, on_meta=True)
    if not layers:
        say(f"{title} has no mixture-of-experts layers that drlora knows", console)
        return
    rows = [_row(alike, rank) for alike in _kinds(layers)]
    show_table(title, rows, figures=("LoRA",), spare=("router",), console=console)
    say(_summary(layers, model, rank), console)
    for reason in dict.fromkeys(layer.obstacle for layer in layers if layer.obstacle):
        say(f"not adaptable: {reason}", console)


def _kinds(layers: Sequence[MoELayer]) -> list[list[MoELayer]]:
    """Group layers that differ only in the numbers in their names."""
    kinds: dict[str, list[MoELayer]] = {}
    for layer in layers:
        router = _pattern(layer.router or "")
        kind = dataclasses.replace(layer, name=_pattern(layer.name), router=router)
        kinds.setdefault(repr(kind), []).append(layer)
    return list(kinds.values())


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _row(alike: Sequence[MoELayer], rank: int) -> dict[str, str]:
    layer = alike[0]
    experts = [f"{layer.num_experts} {layer.experts_class}"]
    experts += [f"{n} {s.in_features} -> {s.out_features}" for n, s in layer.projections.items()]
    stored = format_bytes(sum(one.nbytes for one in alike))
    experts += [f"{layer.dtype}, {stored} in all"]
    convention = layer.convention + (", if named in layers" if layer.only_on_request else "")
    size = f"{sum(lora_parameters(one, rank) for one in alike):,}"
    return {
        "layers": f"{len(alike)} x {_pattern(layer.name) or '(the model)'}",
        "experts": "\n".join(experts),
        "router": (layer.router or "-").rpartition(".")[2],
        "adapted_as": "not adaptable" if layer.obstacle else convention,
        "LoRA": "-" if layer.obstacle else size,
    }


def _summary(layers: Sequence[MoELayer], model: nn.Module, rank: int) -> str:
    can = [layer for layer in layers if layer.obstacle is None and not layer.only_on_request]
    total = sum(lora_parameters(layer, rank) for layer in can)
    of_model = count_parameters(model, layers)
    experts = sum(layer.nbytes for layer in layers)
    rest = max(count_bytes(model) - experts, 0)
    lines = (
        f"{len(can)} of {len(layers)} layers are adapted; LoRA at a mean rank of {rank}: "
        f"{total:,} parameters, {100 * total / max(of_model, 1):.2f} % of the model's {of_model:,}",
        f"the experts take {format_bytes(experts)}, the rest of the model {format_bytes(rest)}",
    )
    return "\n".join(lines)
