"""Merged weights of packed experts, made and written a layer at a time, and of packed Linears.

Shape letters: I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.errors import ModelError
from drlora_torch.lifecycle.residents import Residents, child_name
from drlora_torch.merge.in_place import add, is_packed
from drlora_torch.merge.rounding import Rounding
from drlora_torch.models.quantization import checkpoints, places
from drlora_torch.models.quantization.places import Place
from drlora_torch.models.wrappers import is_adapted_by_peft
from drlora_torch.quantized import holders
from drlora_torch.quantized.four_bit import FourBit


def write(attached: Attached, folder: Path, rounding: Rounding, *, quantize: bool) -> None:
    """Write the merged model into an empty folder, unpacked, or packed as it was."""
    model: Any = attached.model
    if is_adapted_by_peft(model):
        raise ModelError(
            "the model has an adapter of PEFT too; merge that one first: model.merge_and_unload()"
        )
    found = places.find_places(model)
    if quantize:
        _check_quantizable(attached, found)
    hidden = {name for place in found for name in place.tensor_names(model)}
    lora = [
        f"{name}.{child_name(each.name)}."
        for each in Residents.of(model).by_name.values()
        for name in (*each.layers, *each.dense)
    ]
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in hidden and not name.startswith(tuple(lora))
    }
    if not quantize:
        state = checkpoints.unpack_linears(model, state)
    _merge_linears(attached, state, rounding)
    pieces = _layers(attached, found, rounding, quantize)
    checkpoints.write(model, folder, state, pieces, packed=quantize)


@torch.no_grad()
def _merge_linears(attached: Attached, state: dict[str, Any], rounding: Rounding) -> None:
    """Add s B A to the unpacked weights of the Linears, in a state dict."""
    for name, each in attached.dense.items():
        weight = state[f"{name}.weight"]
        delta = each.lora.delta_weight().to(weight.device)
        state[f"{name}.weight"] = add(f"the weight of {name!r}", weight, delta, rounding)


@torch.no_grad()
def _layers(
    attached: Attached, found: list[Place], rounding: Rounding, quantize: bool
) -> Iterator[dict[str, Tensor]]:
    """The weights of the experts of each layer, by their names in the model."""
    for group in places.by_layer(found).values():
        tensors: dict[str, Tensor] = {}
        for place in group:
            tensors |= _merged(attached, place, rounding, quantize)
        yield tensors
        tensors.clear()


def _merged(
    attached: Attached, place: Place, rounding: Rounding, quantize: bool
) -> dict[str, Tensor]:
    name = place.full_name(attached.model)
    layer = attached.layers.get(place.layer)
    targets = {} if layer is None else dict(layer.lora.items())
    ranks = None if layer is None else layer.lora.table.ranks()

    def update(expert: int) -> Tensor | None:
        if layer is None or ranks is None or place.projection not in targets:
            return None
        if expert >= len(ranks) or not ranks[expert]:  # some have no weights that are used
            return None
        return layer.lora.delta_weight(place.projection, expert)

    def merge(expert: int, weight: Tensor) -> Tensor:
        delta = update(expert)
        if delta is None:
            return weight
        where = f"expert {expert} of {name!r}"
        return add(where, weight, delta.to(weight.device), None if quantize else rounding)

    dtype = checkpoints.float_dtype(attached.model)
    weight = places.unpack(place, dtype, merge)
    if not quantize:
        return {name: weight}
    form = holders.formats(place.holder)[place.name]
    assert isinstance(form, FourBit), "checked before"
    packed = form.pack(weight)
    before = places.open_place(place)
    after = form.open(tuple(packed.values()), place.transposed)
    for expert in range(before.shape[0]):
        if (delta := update(expert)) is not None:
            wanted = before.matrix(expert, form.dtype).T.float() + delta.float()
            rounding.add(wanted, after.matrix(expert, form.dtype).T, delta)
    return {name + suffix: tensor for suffix, tensor in packed.items()}


def _check_quantizable(attached: Attached, found: list[Place]) -> None:
    for name, each in attached.dense.items():
        if is_packed(each):
            raise ModelError(
                f"quantize=True packs experts again, and not Linears such as {name!r}, which "
                "attention_rank adapts; leave it out to write the merged model unpacked"
            )
    for place in found:
        form = holders.formats(place.holder).get(place.name)
        if not isinstance(form, FourBit):
            kind = places.open_place(place).kind
            raise ModelError(
                f"quantize=True packs nf4 and fp4, and the experts of {place.layer!r} are {kind}; "
                "leave it out to write the merged model unpacked"
            )
