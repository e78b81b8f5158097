"""Merging: W + s B A written into the expert weights, and taken out again.

A merged model is a plain one with other weights, without a trace of the adapter. The adapter keeps
its LoRA, its engine and a copy of every weight it wrote to; until ``unmerge`` it can only be read.
``unmerge`` copies those weights back, so it is exact: subtracting s B A again would leave rounding
errors.

Shape letters: I input and O output features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.attached import AdaptedLayer, Attached, ExpertWeight, Merged, Original
from drlora_torch.errors import AttachError
from drlora_torch.lifecycle.residents import Residents, check_attached
from drlora_torch.lifecycle.trained import show_trained
from drlora_torch.merge.rounding import Rounding
from drlora_torch.models.conventions import convention_of
from drlora_torch.step import hooks
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.storage.entering import enter
from drlora_torch.storage.travel import settle

Layers = Mapping[str, AdaptedLayer]
SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge(attached: Attached, *, keep_originals: bool) -> None:
    """Write W + s B A into the weights, and take the LoRA out; routers stay trained."""
    check_attached(attached)
    settle(attached)
    residents = Residents.of(attached.model)
    others = [name for name in residents.by_name if name != attached.name]
    if others:
        raise AttachError(
            f"merge() would change the weights under the other adapters of the model "
            f"({', '.join(map(repr, others))}); call their detach() first, or merge_and_save()"
        )
    originals = write(attached.layers)
    try:
        residents.remove(attached)
        show_trained(attached, True)
        if keep_originals:
            attached.merged = Merged(originals, _refuse_steps(attached))
    except BaseException:
        restore(attached.layers, originals)
        if attached.name not in residents.by_name:
            enter(Residents.of(attached.model), attached)
        raise
    if not keep_originals:
        attached.layers = {}


def unmerge(attached: Attached) -> None:
    """Bring back the weights of before :func:`merge`, bit for bit, and the LoRA with them."""
    merged = attached.merged
    if merged is None:
        raise AttachError(
            "this adapter is not merged (or its merge kept no copies of the weights, "
            "keep_originals=False)"
        )
    if not attached.enabled:
        raise AttachError("unmerge() cannot run inside adapter.disabled()")
    check_unmergeable(attached.layers, merged.originals)
    residents = Residents.of(attached.model)
    if residents.by_name:
        raise AttachError("another adapter was attached to the model; call its detach() first")
    restore(attached.layers, merged.originals)
    try:
        enter(residents, attached)
    except BaseException:
        write(attached.layers)
        show_trained(attached, True)
        raise
    merged.stop_guard()
    attached.merged = None


@torch.no_grad()
def write(layers: Layers, rounding: Rounding | None = None) -> dict[ExpertWeight, Original]:
    """Write W + s B A into the weights of all experts that have a rank.

    The sum is taken in the wider dtype of both and rounded once, to that of the weights.
    ``rounding`` counts what that changes.

    Returns:
        The weights as they were, on the CPU. Where writing fails half-way, they are restored.
    """
    for name, layer in layers.items():
        if is_packed(layer):
            raise AttachError(
                f"the experts of {name!r} are stored as {layer.record.dtype}, so W + s B A cannot "
                "be written into them; use merge_and_save(path), or "
                "drlora_torch.dequantize_experts(model) before attach"
            )
    originals: dict[ExpertWeight, Original] = {}
    for place in _places(layers):
        _weight(layers, place)  # weights that cannot be written to are refused before any is
    try:
        for place in _places(layers):
            weight = _weight(layers, place)
            name, projection, expert = place
            delta = layers[name].lora.delta_weight(projection, expert).to(weight.device)
            merged = add(weight, delta, rounding)
            originals[place] = Original(weight.to("cpu", copy=True), _checksum(merged))
            weight.copy_(merged)
    except BaseException:
        restore(layers, originals)
        raise
    return originals


def add(weight: Tensor, delta: Tensor, rounding: Rounding | None = None) -> Tensor:
    """W + s B A of an expert, in the dtype of the weight."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    wanted = weight.to(wide) + delta.to(wide)
    merged = wanted.to(weight.dtype)
    if rounding is not None:
        rounding.add(wanted, merged, delta)
    return merged


@torch.no_grad()
def restore(layers: Layers, originals: Mapping[ExpertWeight, Original]) -> None:
    """Put the kept weights back, bit for bit."""
    for place, original in originals.items():
        _weight(layers, place).copy_(original.values)


@torch.no_grad()
def check_unmergeable(layers: Layers, originals: Mapping[ExpertWeight, Original]) -> None:
    """Refuse to put weights back over others than the merged ones."""
    for place, original in originals.items():
        weight = _weight(layers, place)
        same_kind = (weight.dtype, weight.shape) == (original.values.dtype, original.values.shape)
        # Original already, if an earlier unmerge() was interrupted.
        known = (original.written, _checksum(original.values))
        if not same_kind or _checksum(weight) not in known:
            name, projection, expert = place
            raise AttachError(
                f"{projection} of expert {expert} of layer {name!r} has changed since merge() "
                "(was the merged model trained or converted?); unmerge() would throw that away"
            )


@contextlib.contextmanager
def written(layers: Layers, rounding: Rounding) -> Iterator[None]:
    """Inside, the expert weights are the merged ones; afterwards the original ones again."""
    originals = write(layers, rounding)
    try:
        yield
    finally:
        restore(layers, originals)


def is_packed(layer: AdaptedLayer) -> bool:
    """True if the weights of a layer must be unpacked to be read."""
    return convention_of(layer.experts).is_packed(layer.experts)


def _refuse_steps(attached: Attached) -> Any:
    """Refuse optimizer steps on a LoRA that no forward uses any more; return what ends that."""

    def before(merged: Attached, optimizer: Optimizer, closure: hooks.Closure | None) -> None:
        if hooks.count_held(optimizer, lora_parameters(merged)):
            raise AttachError(
                "an optimizer step on an adapter that is merged into the weights would train "
                "nothing; call adapter.unmerge() first"
            )

    def after(merged: Attached, optimizer: Optimizer) -> None:
        pass

    return hooks.follow_optimizers(attached, before, after)


def _places(layers: Layers) -> Iterator[ExpertWeight]:
    """Every expert with a rank, projection by projection."""
    for name, layer in layers.items():
        for projection, _ in layer.lora.items():
            for expert in np.flatnonzero(layer.lora.table.ranks()).tolist():
                yield name, projection, expert


def _weight(layers: Layers, place: ExpertWeight) -> Tensor:
    """The weight of an expert, a view [O, I]."""
    name, projection, expert = place
    experts = layers[name].experts
    return convention_of(experts).expert_weight(experts, projection, expert).detach()


def _checksum(weight: Tensor) -> int:
    """Sum of the bits as integers: exact, in any order and on any device."""
    bits = weight.contiguous().view(SAME_SIZE[weight.element_size()])
    return int(bits.sum(dtype=torch.int64))
