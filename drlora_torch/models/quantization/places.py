"""Where a model keeps the weights of its experts, for those that pack and unpack them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from drlora_torch.errors import AttachError, ModelError
from drlora_torch.lora.stored import Dense, Stored
from drlora_torch.models.convention import ATTACHMENT, dotted_name
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.discovery import discover
from drlora_torch.models.fused import Fused
from drlora_torch.models.location import ExpertParameter
from drlora_torch.models.records import MoELayer
from drlora_torch.quantized import holders
from drlora_torch.quantized.four_bit import FourBit


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

    def full_name(self, model: nn.Module) -> str:
        """Name of the weight in the model."""
        holder = self.holder
        path = next(name for name, module in model.named_modules() if module is holder)
        return f"{path}.{self.name}"

    def tensor_names(self, model: nn.Module) -> list[str]:
        """Names in the model of the tensors that hold the weight."""
        full = self.full_name(model)
        return [full + suffix for suffix in holders.suffixes(self.holder, self.name)]

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


def unpack_all(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace all packed weights by unpacked ones.

    Raises:
        ModelError: there are none.
    """
    refuse_adapted(model)
    places = [p for p in find_places(model) if p.name in holders.formats(p.holder)]
    if not places:
        raise ModelError(
            f"{type(model).__name__} has no experts that drlora has packed; "
            "drlora_torch.discover(model) lists how they are stored"
        )
    for place in places:
        kept = open_place(place).dtype or torch.bfloat16
        weight = unpack(place, dtype or kept)
        holders.restore(place.holder, place.name, nn.Parameter(weight))
    for group in by_layer(places).values():
        group[0].convention.packed.stop(group[0].experts)


def refuse_adapted(model: nn.Module) -> None:
    """Refuse to exchange weights under an adapter."""
    for name, module in model.named_modules():
        if ATTACHMENT in vars(module):
            raise AttachError(
                f"layer {name!r} has an adapter; quantize or unpack the model first and attach "
                "then, or call adapter.detach()"
            )


def open_place(place: Place) -> Stored:
    """The weight of a place, in whatever storage."""
    return place.convention.stored(place.experts, place.projection)


@torch.no_grad()
def unpack(
    place: Place,
    dtype: torch.dtype,
    change: Callable[[int, Tensor], Tensor] = lambda expert, weight: weight,
) -> Tensor:
    """A packed weight as the model had it, [N, O, I], [N, I, O] or of the shape before packing.

    Args:
        place: where it is.
        dtype: of what is made.
        change: from an expert and its weight [O, I] to what is taken for it.
    """
    packed = holders.open_weight(place.holder, place.name, place.transposed)
    form = holders.formats(place.holder).get(place.name)
    if packed is None:  # one of those that a checkpoint has left as they were
        by_expert = place.convention.by_expert(place.experts, place.weight.detach())
        packed = Dense((by_expert,), place.transposed)
    count, *features = packed.shape
    shape = (count, *(features if place.transposed else features[::-1]))
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    for expert in range(count):
        matrix = change(expert, packed.matrix(expert, packed.dtype or dtype).T)
        weight[expert] = matrix.T if place.transposed else matrix
    if isinstance(packed, Dense):
        return weight.view(place.weight.shape)
    return weight.view(form.shape) if isinstance(form, FourBit) else weight


def start_packed(places: list[Place]) -> None:
    """Let layers run whose weights have been replaced by packed ones.

    Transformers must not draw weights for them where a checkpoint lacks some.
    """
    for place in places:
        place.holder._is_hf_initialized = True
    for group in by_layer(places).values():
        group[0].convention.packed.start(group[0].experts)


def by_layer(places: list[Place]) -> dict[str, list[Place]]:
    """The weights of each layer."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(place.layer, []).append(place)
    return groups
