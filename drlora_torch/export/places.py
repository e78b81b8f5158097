"""Where the weights of adapted layers are, and the names that their experts have or would have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drlora_torch.export import per_expert
from drlora_torch.export.names import joined, own_name
from drlora_torch.models.checkpoint_names import Fused, Place, unfused
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.storage import ExpertParameter, Storage

if TYPE_CHECKING:
    from drlora_torch.adapter import AdaptedLayer, Adapter


def storages(layer: AdaptedLayer) -> dict[str, Storage]:
    """Where a layer keeps each adapted projection."""
    convention = convention_of(layer.experts)
    assert convention is not None
    return {name: convention.storage(layer.experts, name) for name, _ in layer.lora.items()}


def parameters_of(layer: AdaptedLayer) -> dict[str, ExpertParameter]:
    """Those that are in one parameter."""
    return {p: each for p, each in storages(layer).items() if isinstance(each, ExpertParameter)}


class Places:
    """Names of the unfused experts of a model."""

    def __init__(self, adapter: Adapter) -> None:
        self._layers = adapter.layers
        fused = {}
        for name, layer in adapter.layers.items():
            for each in parameters_of(layer).values():
                weight = getattr(layer.experts.get_submodule(each.module), each.name)
                if weight.dim() == 3:
                    shape = tuple(weight.shape)
                    fused[_parameter(name, each)] = Fused(shape, each.transposed)
        self._on_disk = unfused(adapter.model, fused)

    def of(self, name: str, projection: str) -> list[Place]:
        """Places of a projection of a layer: as its checkpoints name them, if they do."""
        return self.candidates(name, projection)[0]

    def candidates(self, name: str, projection: str) -> list[list[Place]]:
        """All namings, best first."""
        layer = self._layers[name]
        storage, experts = storages(layer)[projection], layer.record.num_experts
        shape = layer.record.projections[projection]
        named = [per_expert.own_places(own_name(name), projection, storage, shape, experts)]
        if isinstance(storage, ExpertParameter):
            on_disk = self._on_disk.get(_parameter(name, storage), [])
            named.insert(0, [place for place in on_disk if place.expert < experts])
        return [places for places in named if places]


def _parameter(name: str, storage: ExpertParameter) -> str:
    return joined(own_name(name), storage.module, storage.name)
