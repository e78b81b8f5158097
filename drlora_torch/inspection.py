"""Output of ``drlora inspect``: the MoE layers of a model, their bytes, and the size of their LoRA.

Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from drlora_core.cli.common import format_bytes
from drlora_torch.models.counting import count_parameters
from drlora_torch.models.discovery import discover
from drlora_torch.models.records import MoELayer


def lora_parameters(layer: MoELayer, rank: int) -> int:
    """Return N r (in + out), summed over the projections of a layer; r is the mean rank."""
    per_dimension = sum(s.in_features + s.out_features for s in layer.projections.values())
    return layer.num_experts * rank * per_dimension


def inspect(model: nn.Module, rank: int) -> list[dict[str, Any]]:
    """Return the records of :func:`drlora_torch.discover` as dicts, with the size of their LoRA."""
    return [
        {**dataclasses.asdict(layer), "lora_parameters": lora_parameters(layer, rank)}
        for layer in discover(model)
    ]


def show(title: str, model: nn.Module, rank: int, console: Console) -> None:
    """Print the layers as a table, one row per kind of layer, and the total size of the LoRA."""
    layers = discover(model)
    if not layers:
        console.print(f"{title} has no mixture-of-experts layers that drlora knows")
        return
    columns = ("layers", "experts", "router", "adapted as", "LoRA")
    table = Table(*(Column(c, overflow="fold") for c in columns), title=title, box=box.SIMPLE)
    for alike in _kinds(layers):
        table.add_row(*_row(alike, rank))
    console.print(table)
    console.print(_summary(layers, model, rank))
    for reason in dict.fromkeys(layer.obstacle for layer in layers if layer.obstacle):
        console.print(f"not adaptable: {reason}", markup=False)


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


def _row(alike: Sequence[MoELayer], rank: int) -> tuple[str, ...]:
    layer = alike[0]
    experts = [f"{layer.num_experts} {layer.experts_class}"]
    experts += [f"{n} {s.in_features} -> {s.out_features}" for n, s in layer.projections.items()]
    stored = format_bytes(sum(one.nbytes for one in alike))
    experts += [f"{layer.dtype}, {stored} in all"]
    convention = layer.convention + (", if named in layers" if layer.only_on_request else "")
    size = f"{sum(lora_parameters(one, rank) for one in alike):,}"
    return (
        f"{len(alike)} x {_pattern(layer.name) or '(the model)'}",
        "\n".join(experts),
        (layer.router or "-").rpartition(".")[2],
        "not adaptable" if layer.obstacle else convention,
        "-" if layer.obstacle else size,
    )


def _summary(layers: Sequence[MoELayer], model: nn.Module, rank: int) -> str:
    can = [layer for layer in layers if layer.obstacle is None and not layer.only_on_request]
    total = sum(lora_parameters(layer, rank) for layer in can)
    of_model = count_parameters(model, layers)
    experts = sum(layer.nbytes for layer in layers)
    rest = max(sum(parameter.nbytes for parameter in model.parameters()) - experts, 0)
    lines = (
        f"{len(can)} of {len(layers)} layers are adapted; LoRA at a mean rank of {rank}: "
        f"{total:,} parameters, {100 * total / max(of_model, 1):.2f} % of the model's {of_model:,}",
        f"the experts take {format_bytes(experts)}, the rest of the model {format_bytes(rest)}",
    )
    return "\n".join(lines)
