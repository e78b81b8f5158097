"""Where the weights of adapted layers are, and the names that their experts have or would have."""

from __future__ import annotations

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.models.checkpoint_names import Fused, Place, unfused
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter, Location
from drlora_torch.storage.peft import per_expert
from drlora_torch.storage.peft.names import joined, own_name


def locations(layer: AdaptedLayer) -> dict[str, Location]:
    """Where a layer keeps each adapted projection."""
    convention = convention_of(layer.experts)
    return {name: convention.location(layer.experts, name) for name, _ in layer.lora.items()}


def parameters_of(layer: AdaptedLayer) -> dict[str, ExpertParameter]:
    """Those that are in one parameter."""
    return {p: each for p, each in locations(layer).items() if isinstance(each, ExpertParameter)}


class Places:
    """Names of the unfused experts of a model."""

    def __init__(self, attached: Attached) -> None:
        self._layers = attached.layers
        fused = {}
        for name, layer in attached.layers.items():
            for each in parameters_of(layer).values():
                weight = getattr(layer.experts.get_submodule(each.module), each.name)
                if weight.dim() == 3:
                    shape = tuple(weight.shape)
                    fused[_parameter(name, each)] = Fused(shape, each.transposed)
        self._on_disk = unfused(attached.model, fused)

    def of(self, name: str, projection: str) -> list[Place]:
        """Places of a projection of a layer: as its checkpoints name them, if they do."""
        return self.candidates(name, projection)[0]

    def candidates(self, name: str, projection: str) -> list[list[Place]]:
        """All namings, best first."""
        layer = self._layers[name]
        where, experts = locations(layer)[projection], layer.record.num_experts
        shape = layer.record.projections[projection]
        named = [per_expert.own_places(own_name(name), projection, where, shape, experts)]
        if isinstance(where, ExpertParameter):
            on_disk = self._on_disk.get(_parameter(name, where), [])
            named.insert(0, [place for place in on_disk if place.expert < experts])
        return [places for places in named if places]


def _parameter(name: str, where: ExpertParameter) -> str:
    return joined(own_name(name), where.module, where.name)
