"""Build the state of an adapter; the model is not changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from drlora_core import AllocatorEngine
from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.errors import AttachError
from drlora_torch.lifecycle.dense import adapt_linears
from drlora_torch.lifecycle.dense_choice import choose_linears
from drlora_torch.lifecycle.modules import choose_modules
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.slots import IntArray, Layout, SlotTable
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.records import MoELayer
from drlora_torch.models.sharding import find_spread
from drlora_torch.options import AdapterOptions
from drlora_torch.step.newborn import OLD

LARGE = 2**26
"""Numbers of a layer's LoRA, 256 MiB in float32, up to which it may be larger than its experts."""


def build(
    name: str,
    model: nn.Module,
    engine: AllocatorEngine,
    options: AdapterOptions,
    records: Sequence[MoELayer],
    found: Sequence[MoELayer],
    process_group: Any = None,
) -> Attached:
    """Build an adapter for some of the layers found, with the engine's ranks and all slots at 0."""
    layers = {record.name: _adapt(model, engine, options, record) for record in records}
    ages = {
        name: np.full(layer.lora.table.num_slots, OLD, dtype=np.int64)
        for name, layer in layers.items()
    }
    modules = choose_modules(model, options.modules_to_save, records)
    dense = adapt_linears(choose_linears(model, options, found, modules), engine, options)
    return Attached(name, model, engine, options, layers, ages, modules, dense, process_group)


def draw(attached: Attached) -> None:
    """Draw the starting rows of A."""
    for layer in attached.layers.values():
        layer.lora.draw()
    for each in attached.dense.values():
        each.lora.draw()


def _adapt(
    model: nn.Module, engine: AllocatorEngine, options: AdapterOptions, record: MoELayer
) -> AdaptedLayer:
    config = engine.config
    num_slots = record.num_experts * options.slots_per_expert(config)
    _check_size(record, num_slots, options)
    table = SlotTable(num_slots, record.num_experts, config.r_max, options.layout)
    table.grow(_ranks(engine, record))
    experts = model.get_submodule(record.name)
    weight = convention_of(experts).first_weight(experts)
    assert weight is not None
    lora = ExpertLoRA(
        record.name,
        {n: s for n, s in record.projections.items() if n in (options.targets or (n,))},
        table,
        options.scaling(config),
        options.dropout,
        config.seed,
        options.kernel,
    )
    lora.to(device=weight.device, dtype=options.lora_dtype(weight.dtype))
    if (spread := find_spread(model, record.name)) is not None:
        lora.shard(spread)
    router = None if record.router is None else model.get_submodule(record.router)
    return AdaptedLayer(record, experts, lora, router)


def _check_size(record: MoELayer, num_slots: int, options: AdapterOptions) -> None:
    """Refuse what only a slip or a hostile file asks for, before it is allocated."""
    shapes = record.projections.values()
    lora = num_slots * sum(shape.in_features + shape.out_features for shape in shapes)
    base = record.num_experts * sum(shape.in_features * shape.out_features for shape in shapes)
    if lora > max(LARGE, 4 * base):
        field = "r_max" if options.layout is Layout.MASKED else "r_target"
        raise AttachError(
            f"layer {record.name!r}: the LoRA of {num_slots:,} ranks would have {lora:,} numbers, "
            f"more than 4 times those of the experts, {base:,}; use a smaller {field}"
        )


def _ranks(engine: AllocatorEngine, record: MoELayer) -> IntArray:
    """The ranks of a layer; an engine gets its layers only once the adapter is in the model."""
    if record.name in engine.layer_names:
        return engine.ranks(record.name)
    return np.full(record.num_experts, engine.config.starting_rank, dtype=np.int64)
