"""Merging: W + s B A written into the adapted weights, and taken out again.

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

from drlora_torch.attached import (
    AdaptedLayer,
    AdaptedLinear,
    Attached,
    ExpertWeight,
    Merged,
    Original,
)
from drlora_torch.errors import AttachError
from drlora_torch.lifecycle.residents import Residents, check_attached
from drlora_torch.lifecycle.trained import show_trained
from drlora_torch.merge.rounding import Rounding
from drlora_torch.models.conventions import convention_of
from drlora_torch.step import growth, hooks
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.storage import checkpoint
from drlora_torch.storage.entering import enter
from drlora_torch.storage.finite import check_weights
from drlora_torch.storage.travel import settle

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
    checkpoint.check_finite(attached)
    originals = write(attached)
    try:
        residents.remove(attached)
        show_trained(attached, True)
        if keep_originals:
            attached.merged = Merged(originals, _refuse_steps(attached), attached.engine.step_count)
    except BaseException:
        restore(attached, originals)
        if attached.name not in residents.by_name:
            enter(Residents.of(attached.model), attached)
        raise
    if not keep_originals:
        attached.layers, attached.dense = {}, {}


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
    check_unmergeable(attached, merged.originals)
    residents = Residents.of(attached.model)
    if residents.by_name:
        raise AttachError("another adapter was attached to the model; call its detach() first")
    if attached.engine.step_count != merged.step:
        growth.check_ranks(attached)
    restore(attached, merged.originals)
    try:
        enter(residents, attached)
    except BaseException:
        write(attached)
        show_trained(attached, True)
        raise
    merged.stop_guard()
    attached.merged = None


@torch.no_grad()
def write(attached: Attached, rounding: Rounding | None = None) -> dict[ExpertWeight, Original]:
    """Write W + s B A into the weights of the Linears and of all experts that have a rank.

    The sum is taken in the wider dtype of both and rounded once, to that of the weights.
    ``rounding`` counts what that changes.

    Returns:
        The weights as they were, on the CPU. Where writing fails half-way, they are restored.
    """
    _check_writable(attached)
    originals: dict[ExpertWeight, Original] = {}
    for place in _places(attached):
        _weight(attached, place)  # weights that cannot be written to are refused before any is
    try:
        for place in _places(attached):
            weight = _weight(attached, place)
            delta = _delta(attached, place).to(weight.device)
            merged = add(_describe(attached, place), weight, delta, rounding)
            originals[place] = Original(weight.to("cpu", copy=True), _checksum(merged))
            weight.copy_(merged)
    except BaseException:
        restore(attached, originals)
        raise
    return originals


def add(where: str, weight: Tensor, delta: Tensor, rounding: Rounding | None = None) -> Tensor:
    """W + s B A of an expert, in the dtype of the weight.

    Raises:
        NotFiniteError: the sum is not finite, or overflows the dtype.
    """
    wide = torch.promote_types(weight.dtype, delta.dtype)
    wanted = weight.to(wide) + delta.to(wide)
    merged = wanted.to(weight.dtype)
    check_weights(f"W + s B A of {where}, as {weight.dtype},", merged)
    if rounding is not None:
        rounding.add(wanted, merged, delta)
    return merged


@torch.no_grad()
def restore(attached: Attached, originals: Mapping[ExpertWeight, Original]) -> None:
    """Put the kept weights back, bit for bit."""
    for place, original in originals.items():
        _weight(attached, place).copy_(original.values)


@torch.no_grad()
def check_unmergeable(attached: Attached, originals: Mapping[ExpertWeight, Original]) -> None:
    """Refuse to put weights back over others than the merged ones."""
    for place, original in originals.items():
        weight = _weight(attached, place)
        same_kind = (weight.dtype, weight.shape) == (original.values.dtype, original.values.shape)
        # Original already, if an earlier unmerge() was interrupted.
        known = (original.written, _checksum(original.values))
        if not same_kind or _checksum(weight) not in known:
            raise AttachError(
                f"{_describe(attached, place)} has changed since merge() "
                "(was the merged model trained or converted?); unmerge() would throw that away"
            )


@contextlib.contextmanager
def written(attached: Attached, rounding: Rounding) -> Iterator[None]:
    """Inside, the expert weights are the merged ones; afterwards the original ones again."""
    originals = write(attached, rounding)
    try:
        yield
    finally:
        restore(attached, originals)


def is_packed(adapted: AdaptedLayer | AdaptedLinear) -> bool:
    """True if the weights of a layer, or of a Linear, must be unpacked to be read."""
    if isinstance(adapted, AdaptedLinear):
        weight = adapted.linear.weight
        plain = weight.is_floating_point() and weight.itemsize > 1
        return not plain or hasattr(weight, "__tensor_flatten__")
    return convention_of(adapted.experts).is_packed(adapted.experts)


def _check_writable(attached: Attached) -> None:
    """Refuse weights that W + s B A cannot be written into."""
    for name, layer in attached.layers.items():
        if is_packed(layer):
            raise AttachError(
                f"the experts of {name!r} are stored as {layer.record.dtype}, so W + s B A cannot "
                "be written into them; use merge_and_save(path), or "
                "drlora_torch.dequantize_experts(model) before attach"
            )
    for name, each in attached.dense.items():
        if is_packed(each):
            weight = each.linear.weight
            raise AttachError(
                f"{name!r} is stored as {type(weight).__name__} ({weight.dtype}), so W + s B A "
                "cannot be written into it; use merge_and_save(path), or drlora_torch.load the "
                "adapter onto a base that is not quantized"
            )


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


def _places(attached: Attached) -> Iterator[ExpertWeight]:
    """Every expert with a rank, projection by projection, and every Linear."""
    for name, layer in attached.layers.items():
        for projection, _ in layer.lora.items():
            for expert in np.flatnonzero(layer.lora.table.ranks()).tolist():
                yield name, projection, expert
    yield from ((name, "weight", 0) for name in attached.dense)


def _describe(attached: Attached, place: ExpertWeight) -> str:
    name, projection, expert = place
    if name in attached.dense:
        return f"the weight of {name!r}"
    return f"{projection} of expert {expert} of layer {name!r}"


def _weight(attached: Attached, place: ExpertWeight) -> Tensor:
    """The weight of a place, a view [O, I]."""
    name, projection, expert = place
    if name in attached.dense:
        return attached.dense[name].linear.weight.detach()
    experts = attached.layers[name].experts
    return convention_of(experts).expert_weight(experts, projection, expert).detach()


def _delta(attached: Attached, place: ExpertWeight) -> Tensor:
    """s B A of a place, [O, I]."""
    name, projection, expert = place
    if name in attached.dense:
        return attached.dense[name].lora.delta_weight()
    return attached.layers[name].lora.delta_weight(projection, expert)


def _checksum(weight: Tensor) -> int:
    """Sum of the bits as integers: exact, in any order and on any device."""
    bits = weight.contiguous().view(SAME_SIZE[weight.element_size()])
    return int(bits.sum(dtype=torch.int64))
