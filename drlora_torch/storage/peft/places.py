"""Names in an adapter directory: of modules, and of experts that the model may keep fused."""

from __future__ import annotations

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.models.checkpoint_names import Fused, Place, unfused
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertLinears, ExpertParameter, Location

PREFIX = "base_model.model."
"""PEFT puts it before every name of a tensor."""
FUSED, PARTS = "gate_up_proj", ("gate_proj", "up_proj")


def own_name(name: str) -> str:
    """Name of a module in the model itself, where that is already inside a PeftModel."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def joined(*parts: str) -> str:
    """Dotted name of parts, of which some may be empty.

    Example:
        >>> joined("mlp", "", "w1")
        'mlp.w1'
    """
    return ".".join(part for part in parts if part)


def locations(layer: AdaptedLayer) -> dict[str, Location]:
    """Where a layer keeps each adapted projection."""
    convention = convention_of(layer.experts)
    return {name: convention.location(layer.experts, name) for name, _ in layer.lora.items()}


def parameters_of(layer: AdaptedLayer) -> dict[str, ExpertParameter]:
    """The projections of a layer that are one parameter each."""
    return {p: each for p, each in locations(layer).items() if isinstance(each, ExpertParameter)}


def namings(attached: Attached) -> dict[tuple[str, str], list[list[Place]]]:
    """The places of every layer and projection under each naming, preferred naming first.

    Transformers is asked for the names that its checkpoints have; experts that stay fused there
    have only those of :func:`own_places`.
    """
    fused = {}
    for layer in attached.layers.values():
        for each in parameters_of(layer).values():
            weight = getattr(layer.experts.get_submodule(each.module), each.name)
            if weight.dim() == 3:
                fused[qualified(layer, each)] = Fused(tuple(weight.shape), each.transposed)
    on_disk = unfused(attached.model, fused)
    found = {}
    for name, layer in attached.layers.items():
        for projection, where in locations(layer).items():
            candidates = [own_places(layer, projection, where)]
            if isinstance(where, ExpertParameter):
                named = on_disk.get(qualified(layer, where), [])
                experts = layer.record.num_experts
                candidates.insert(0, [place for place in named if place.expert < experts])
            found[name, projection] = [each for each in candidates if each]
    return found


def own_places(layer: AdaptedLayer, projection: str, where: Location) -> list[Place]:
    """Places under the names that the model itself has, or would have if it were not fused.

    Fused experts get ``{experts}.{i}.gate_proj``, ``up_proj`` and ``down_proj``, or the
    projection's own name.
    """
    name = own_name(layer.record.name)
    outputs = layer.record.projections[projection].out_features
    parts = [(projection, slice(0, outputs))]
    if isinstance(where, ExpertLinears):
        return [
            Place(joined(name, expert, where.projection), index, slice(0, outputs))
            for index, expert in enumerate(where.experts)
        ]
    if projection == FUSED:
        half = outputs // 2
        rows = [slice(0, half), slice(half, outputs)]
        if where.interleaved:
            rows = [slice(0, outputs, 2), slice(1, outputs, 2)]
        parts = list(zip(PARTS, rows, strict=True))
    parent = joined(name, where.module if where.name == projection else "")
    return [
        Place(joined(parent, str(expert), part), expert, rows)
        for expert in range(layer.record.num_experts)
        for part, rows in parts
    ]


def qualified(layer: AdaptedLayer, where: ExpertParameter) -> str:
    """Name of a parameter in the model itself."""
    return joined(own_name(layer.record.name), where.module, where.name)
