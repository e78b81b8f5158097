"""Quantize the experts of a model that is in memory, and bring them back.

Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from drlora_torch.errors import ModelError
from drlora_torch.lora import parts
from drlora_torch.lora.stored import Dense
from drlora_torch.models.discovery import discover
from drlora_torch.models.quantization.loading import check_dtype
from drlora_torch.models.quantization.owners import foreign_method, is_own
from drlora_torch.models.quantization.places import (
    Place,
    by_layer,
    find_places,
    refuse_adapted,
    start_packed,
    unpack_all,
)
from drlora_torch.models.quantization.quantizer import METHOD, Experts4bitConfig, ExpertsQuantizer
from drlora_torch.models.wrappers import unwrapped
from drlora_torch.quantized import holders
from drlora_torch.quantized.four_bit import load_bitsandbytes

UNPACKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertBytes:
    """Bytes that the weights of the experts of a model take."""

    before: int
    after: int


def quantize_experts(
    model: nn.Module, *, quant_type: str = "nf4", double_quant: bool = True
) -> ExpertBytes:
    """Quantize the expert weights of a model to 4 bits, in place; everything else stays as it is.

    Weights are packed by bitsandbytes in blocks of 64 values, expert by expert. The model runs,
    trains with :func:`drlora_torch.attach`, and ``save_pretrained`` writes the packed weights. To
    quantize while loading, see :class:`drlora_torch.Experts4bitConfig`.

    Args:
        model: a Transformers model, on any device, without an adapter. Its experts are float32,
            bfloat16 or float16. If this is interrupted, layers that are packed stay so and run;
            ``dequantize_experts`` unpacks them.
        quant_type: ``nf4``, for weights that are distributed normally, or ``fp4``.
        double_quant: quantize the scales too: 0.516 bytes a weight instead of 0.563.

    Returns:
        What the experts took before, and take now.

    Raises:
        ModelError: bitsandbytes is missing or too old, or the experts cannot be quantized; the
            model is unchanged.
        AttachError: the model has an adapter.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> model = OlmoeForCausalLM(OlmoeConfig(hidden_size=64, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        ...     num_experts_per_tok=2, vocab_size=16))
        >>> quantize_experts(model)
        ExpertBytes(before=98304, after=12768)
    """
    config = Experts4bitConfig(quant_type=quant_type, double_quant=double_quant)
    model = _inside(model)
    places = _quantizable(model)
    before = stored_bytes(model)
    done: list[Place] = []
    try:
        for group in by_layer(places).values():
            _pack_layer(group, quant_type, double_quant)
            done += group
    finally:  # if it was interrupted, what is packed runs, and can be unpacked
        if done:
            announce(model, config, done)
    return ExpertBytes(before, stored_bytes(model))


def _pack_layer(group: list[Place], quant_type: str, double_quant: bool) -> None:
    """Pack the weights of a layer: all of them, or none."""
    forms = [place.form(quant_type, double_quant) for place in group]
    packed = [form.pack(place.weight.detach()) for place, form in zip(group, forms, strict=True)]
    for place, form, tensors in zip(group, forms, packed, strict=True):
        holders.declare(place.holder, place.name, form, tensors)
    start_packed(group)


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> ExpertBytes:
    """Unpack the expert weights of a model, in place; the rounding of packing stays.

    Args:
        model: a model whose experts drlora has packed or loaded packed; without an adapter.
        dtype: of the weights; default that of before packing, or bfloat16 for MXFP4.

    Raises:
        ModelError: there are no such experts, or the dtype is no such one.
        AttachError: the model has an adapter.
    """
    model = _inside(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in UNPACKED):
        known = ", ".join(map(str, UNPACKED))
        raise ModelError(f"dtype must be {known} or None, got {dtype!r}")
    refuse_adapted(model)
    before = stored_bytes(model)
    unpack_all(model, dtype)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if is_own(model):
        quantizer.remove_quantization_config(model)
    return ExpertBytes(before, stored_bytes(model))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the expert weights, in whatever storage."""
    return sum(layer.nbytes for layer in discover(model))


def _inside(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, whose names and quantizer are those of Transformers."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return unwrapped(model)


def _quantizable(model: nn.Module) -> list[Place]:
    """The weights of all experts, after every check."""
    load_bitsandbytes()
    refuse_adapted(model)
    for layer in discover(model):
        if layer.obstacle is not None and layer.convention != "none":
            raise ModelError(f"layer {layer.name!r} cannot be quantized: {layer.obstacle}")
    places = find_places(model)
    for place in places:
        _check(place)
    if foreign_method(model) is not None and any(place.name == "weight" for place in places):
        raise ModelError(
            f"the experts of {type(model).__name__} cannot be packed beside Linears that are "
            "quantized; load the model without quantization_config"
        )
    return places


def _check(place: Place) -> None:
    what = f"{place.projection} of layer {place.layer!r}"
    stored = place.convention.stored(place.experts, place.projection)
    if not isinstance(stored, Dense):
        raise ModelError(
            f"{what} is quantized already ({stored.kind}); "
            "drlora_torch.dequantize_experts(model) unpacks it"
        )
    if parts.is_sharded(place.weight):
        raise ModelError(f"{what} is spread over processes; quantize the model before that")
    check_dtype(place)
    if "_old_forward" in vars(place.holder) and place.convention.name != "interface":
        raise ModelError(
            f"{what} has been dispatched to a device by Accelerate; quantize it before"
        )
    with torch.no_grad():
        lowest, highest = torch.aminmax(place.weight)
    if not (lowest.isfinite() and highest.isfinite()):
        raise ModelError(
            f"{what} has values that are not finite, which cannot be quantized; load a checkpoint "
            "without them"
        )


def announce(model: Any, config: Experts4bitConfig, places: list[Place]) -> None:
    """Let Transformers know that the experts of a model have been packed in memory."""
    if not hasattr(model, "save_pretrained"):
        return
    before: Any = getattr(model, "hf_quantizer", None)
    if before is not None:
        config.rest = before.quantization_config
    quantizer = ExpertsQuantizer(config, pre_quantized=False)
    quantizer.rest = before
    names = {id(module): name for name, module in model.named_modules()}
    quantizer.places = {f"{names[id(p.holder)]}.{p.name}": p for p in places}
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as save_pretrained chooses them
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if not isinstance(each, PrefixChange)]
    quantizer.keep_conversions(model, conversions)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = METHOD
    model.config.quantization_config = config
