"""Quantize the experts of a model that is in memory, and bring them back.

Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from drlora_torch.errors import AttachError, ModelError
from drlora_torch.lora import parts
from drlora_torch.lora.stored import Dense
from drlora_torch.models.convention import ATTACHMENT, dotted_name
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.discovery import discover
from drlora_torch.models.fused import Fused
from drlora_torch.models.location import ExpertParameter
from drlora_torch.models.records import MoELayer
from drlora_torch.quantized import holders
from drlora_torch.quantized.four_bit import DTYPES, FourBit, load_bitsandbytes


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertBytes:
    """Bytes that the weights of the experts of a model take."""

    before: int
    after: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The weight of one projection of all experts of a layer, in the module that holds it."""

    layer: str
    convention: Fused
    experts: Any
    projection: str

    @property
    def holder(self) -> Any:
        return self.experts.get_submodule(self._where.module)

    @property
    def name(self) -> str:
        """Name of the weight in its holder."""
        return self._where.name

    @property
    def transposed(self) -> bool:
        return self._where.transposed

    @property
    def _where(self) -> ExpertParameter:
        return self.convention.location(self.experts, self.projection)

    @property
    def weight(self) -> nn.Parameter:
        return cast("nn.Parameter", getattr(self.holder, self.name))

    def form(self, quant_type: str, double_quant: bool) -> FourBit:
        """How the weight would be packed."""
        shape = tuple(self.weight.shape)
        count = shape[0] if len(shape) == 3 else self.convention.num_experts(self.experts)
        return FourBit(quant_type, double_quant, shape, count, self.weight.dtype)


def find_places(model: nn.Module) -> list[Place]:
    """The weights of all experts; a ModelError says where there are none that could be packed.

    They may be on the meta device.
    """
    layers = discover(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no mixture-of-experts layer that drlora knows, so there "
            "are no experts to quantize"
        )
    return [place for layer in layers for place in _places(model, layer)]


def _places(model: nn.Module, layer: MoELayer) -> Iterator[Place]:
    experts = model.get_submodule(layer.name)
    if layer.convention == "none":
        raise ModelError(f"the experts of {layer.name!r} cannot be quantized: {layer.obstacle}")
    convention = convention_of(experts)
    if not isinstance(convention, Fused):
        raise ModelError(
            f"the experts of {layer.name!r} are Linears, one each ({dotted_name(type(experts))}): "
            "load the model with transformers.BitsAndBytesConfig(load_in_4bit=True), which "
            "quantizes Linears"
        )
    for projection in convention.weights(experts):
        yield Place(layer.name, convention, experts, projection)


def quantize_experts(
    model: nn.Module, *, quant_type: str = "nf4", double_quant: bool = True
) -> ExpertBytes:
    """Quantize the expert weights of a model to 4 bits, in place; everything else stays as it is.

    Weights are packed by bitsandbytes in blocks of 64 values, expert by expert. The model runs,
    trains with :func:`drlora_torch.attach`, and ``save_pretrained`` writes the packed weights. To
    quantize while loading, see :class:`drlora_torch.Experts4bitConfig`.

    Args:
        model: a Transformers model, on any device, without an adapter. Its experts are float32,
            bfloat16 or float16.
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
    from drlora_torch.models.quantizer import Experts4bitConfig, announce

    config = Experts4bitConfig(quant_type=quant_type, double_quant=double_quant)
    places = _quantizable(model)
    before = sum(place.weight.nbytes for place in places)
    for place in places:
        form = place.form(quant_type, double_quant)
        holders.declare(place.holder, place.name, form, form.pack(place.weight.detach()))
    start_packed(places)
    announce(model, config, places)
    return ExpertBytes(before, stored_bytes(model))


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> ExpertBytes:
    """Unpack the expert weights of a model, in place; the rounding of packing stays.

    Args:
        model: a model whose experts drlora has packed or loaded packed; without an adapter.
        dtype: of the weights; default that of before packing, or bfloat16 for MXFP4.

    Raises:
        ModelError: there are no such experts.
        AttachError: the model has an adapter.
    """
    from drlora_torch.models.quantizer import withdraw

    _refuse_adapted(model)
    places = [p for p in find_places(model) if p.name in holders.formats(p.holder)]
    if not places:
        raise ModelError(
            f"{type(model).__name__} has no experts that drlora has packed; "
            "drlora_torch.discover(model) lists how they are stored"
        )
    before = stored_bytes(model)
    for place in places:
        holders.restore(place.holder, place.name, nn.Parameter(_unpack(place, dtype)))
    for _, group in by_layer(places).items():
        group[0].convention.packed.stop(group[0].experts)
    withdraw(model)
    return ExpertBytes(before, stored_bytes(model))


@torch.no_grad()
def _unpack(place: Place, dtype: torch.dtype | None) -> Tensor:
    """A weight as the model has it, [N, O, I], [N, I, O] or of the shape it was packed in."""
    packed = holders.open_weight(place.holder, place.name, place.transposed)
    assert packed is not None, "it has a format"
    dtype = dtype or packed.dtype or torch.bfloat16
    form = holders.formats(place.holder)[place.name]
    count, *features = packed.shape
    shape = (count, *(features if place.transposed else features[::-1]))
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    for expert in range(count):
        matrix = packed.matrix(expert, packed.dtype or dtype)
        weight[expert] = matrix if place.transposed else matrix.T
    return weight.view(form.shape) if isinstance(form, FourBit) else weight


def start_packed(places: list[Place]) -> None:
    """Let layers run whose weights have been replaced by packed ones."""
    for group in by_layer(places).values():
        group[0].convention.packed.start(group[0].experts)


def by_layer(places: list[Place]) -> dict[str, list[Place]]:
    """The weights of each layer."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(place.layer, []).append(place)
    return groups


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the expert weights, in whatever storage."""
    return sum(layer.nbytes for layer in discover(model))


def _refuse_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if ATTACHMENT in vars(module):
            raise AttachError(
                f"layer {name!r} has an adapter; quantize or unpack the model first and attach "
                "then, or call adapter.detach()"
            )


def _quantizable(model: nn.Module) -> list[Place]:
    """The weights of all experts, after every check."""
    load_bitsandbytes()
    _refuse_adapted(model)
    for layer in discover(model):
        if layer.obstacle is not None and layer.convention != "none":
            raise ModelError(f"layer {layer.name!r} cannot be quantized: {layer.obstacle}")
    places = find_places(model)
    for place in places:
        _check(place)
    return places


def _check(place: Place) -> None:
    what = f"{place.projection} of layer {place.layer!r}"
    stored = place.convention.stored(place.experts, place.projection)
    if not isinstance(stored, Dense):
        raise ModelError(f"{what} is quantized already ({stored.kind})")
    if parts.is_sharded(place.weight):
        raise ModelError(f"{what} is spread over processes; quantize the model before that")
    if stored.dtype not in DTYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ModelError(f"{what} is {stored.kind}; only {known} can be quantized")
    if "_old_forward" in vars(place.holder) and place.convention.name != "interface":
        raise ModelError(
            f"{what} has been dispatched to a device by Accelerate; quantize it before"
        )
    with torch.no_grad():
        lowest, highest = torch.aminmax(place.weight)
    if not (lowest.isfinite() and highest.isfinite()):
        raise ModelError(f"{what} has values that are not finite, which cannot be quantized")
