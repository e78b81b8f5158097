"""The two layouts of a projection's LoRA in a PEFT directory, each for writing and for reading.

*Stacked*: LoRA of a parameter with the weights of all experts (``target_parameters``). It has one
rank for all of them: smaller ones are padded with zeros, which changes nothing but memory. The
factors are flat: lora_A [N*R, I] has the expert slowest, lora_B [O, R*N] has it fastest. Several
parameters of one module are wrappers within wrappers, in the order of the module's parameters: the
first is the innermost, and each ``base_layer`` of its key names one layer above it. PEFT 0.21 reads
a weight [N, x, y] as [N, O, I], and as [N, I, O] where its module says ``is_transposed``. Where
that is the wrong way round, A and B change places: (B A)^T = A^T B^T.

*Per expert*: ``{expert}.gate_proj.lora_A.weight`` [R, I] and ``lora_B.weight`` [O, R], likewise for
the other projections, under the names of Linears or of unfused experts: what engines read that
serve models by the names of their checkpoints. Parts of a fused projection get the same A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.models.checkpoint_names import Fused, Place, unfused
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertLinears, ExpertParameter
from drlora_torch.storage.peft.config import PeftConfig
from drlora_torch.storage.peft.factors import Expert, Factors
from drlora_torch.storage.peft.files import PREFIX, joined, own_name

Tensors = dict[str, Tensor]


class Stacked(NamedTuple):
    """A parameter of all experts as PEFT sees it."""

    parameter: str
    """Qualified name, as ``target_parameters`` has it."""
    key: str
    """Name of its wrapper in the state dict."""
    experts: int
    """Experts that PEFT counts: those of the parameter, some of which may not be adapted."""
    swapped: bool
    """PEFT takes inputs for outputs."""

    def tensors(self, factors: Factors) -> Tensors:
        lora_A, lora_B = factors
        if self.swapped:
            lora_A, lora_B = lora_B.transpose(1, 2), lora_A.transpose(1, 2)
        if missing := self.experts - lora_A.shape[0]:
            pad = (0, 0, 0, 0, 0, missing)
            lora_A, lora_B = (nn.functional.pad(each, pad) for each in (lora_A, lora_B))
        return {
            f"{PREFIX}{self.key}.lora_A.weight": lora_A.flatten(0, 1),
            f"{PREFIX}{self.key}.lora_B.weight": lora_B.permute(1, 2, 0).flatten(1),
        }

    def take(self, held: Tensors, config: PeftConfig, experts: int) -> list[Expert]:
        """Take the LoRA of the first experts out of ``held``, scaled for a scaling of 1."""
        try:
            flat_A, flat_B = (held.pop(f"{PREFIX}{self.key}.lora_{part}.weight") for part in "AB")
            lora_A = flat_A.reshape(self.experts, -1, flat_A.shape[-1])
            lora_B = flat_B.reshape(flat_B.shape[0], -1, self.experts).permute(2, 0, 1)
        except (KeyError, RuntimeError, IndexError) as error:
            message = f"no LoRA of {self.experts} experts at {self.key!r}: {error}"
            raise CheckpointError(message) from error
        if self.swapped:
            lora_A, lora_B = lora_B.transpose(1, 2), lora_A.transpose(1, 2)
        lora_B = config.scaling(self.parameter) * lora_B
        return list(zip(lora_A[:experts], lora_B[:experts], strict=True))


def _parameters_of(layer: AdaptedLayer) -> dict[str, ExpertParameter]:
    convention = convention_of(layer.experts)
    found = {p: convention.location(layer.experts, p) for p, _ in layer.lora.items()}
    return {p: where for p, where in found.items() if isinstance(where, ExpertParameter)}


def _qualified(layer: AdaptedLayer, where: ExpertParameter) -> str:
    return joined(own_name(layer.record.name), where.module, where.name)


def stacked(layer: AdaptedLayer, suffixes: tuple[str, ...] = ("",)) -> dict[str, Stacked]:
    """What PEFT makes of the parameters of a layer whose names, after a dot, end like this."""
    name = layer.record.name
    chosen = {
        projection: where
        for projection, where in _parameters_of(layer).items()
        if f".{_qualified(layer, where)}".endswith(suffixes)
    }
    found = {}
    for projection, where in chosen.items():
        if where.read_from_outside:
            raise CheckpointError(
                f"PEFT cannot adapt {projection} of layer {name!r}, whose weight is read outside "
                "its module; use export_peft(per_expert=True) or merge_and_save()"
            )
        wrapper = joined(own_name(name), where.module)
        if not wrapper:
            raise CheckpointError("PEFT cannot adapt a parameter of the model itself")
        module = layer.experts.get_submodule(where.module)
        wrapped = {each.name for each in chosen.values() if each.module == where.module}
        order = [each for each, _ in module.named_parameters(recurse=False) if each in wrapped]
        outer = len(order) - 1 - order.index(where.name)
        found[projection] = Stacked(
            _qualified(layer, where),
            wrapper + ".base_layer" * outer,
            getattr(module, where.name).shape[0],
            where.transposed != getattr(module, "is_transposed", False),
        )
    return found


def namings(attached: Attached) -> dict[tuple[str, str], list[list[Place]]]:
    """The places of every layer and projection under each naming, preferred naming first.

    Transformers is asked for the names that its checkpoints have; experts that stay fused there
    have only those of :func:`own_places`.
    """
    fused, keys = {}, {}
    for name, layer in attached.layers.items():
        for projection, where in _parameters_of(layer).items():
            weight = getattr(layer.experts.get_submodule(where.module), where.name)
            if weight.dim() == 3:
                keys[name, projection] = key = _qualified(layer, where)
                fused[key] = Fused(tuple(weight.shape), where.transposed)
    on_disk = unfused(attached.model, fused)
    found = {}
    for name, layer in attached.layers.items():
        for projection, _ in layer.lora.items():
            named = on_disk.get(keys.get((name, projection), ""), [])
            adapted = [place for place in named if place.expert < layer.record.num_experts]
            own = own_places(layer, projection)
            found[name, projection] = [adapted, own] if adapted else [own]
    return found


def own_places(layer: AdaptedLayer, projection: str) -> list[Place]:
    """Places under the names that the model itself has, or would have if it were not fused.

    Fused experts get ``{experts}.{i}.gate_proj``, ``up_proj`` and ``down_proj``, or the
    projection's own name.
    """
    name = own_name(layer.record.name)
    where = convention_of(layer.experts).location(layer.experts, projection)
    outputs = layer.record.projections[projection].out_features
    parts = [(projection, slice(0, outputs))]
    if isinstance(where, ExpertLinears):
        names = (joined(name, expert, where.projection) for expert in where.experts)
        return [Place(each, index, slice(0, outputs)) for index, each in enumerate(names)]
    if projection == "gate_up_proj":
        half = outputs // 2
        gate, up = slice(0, half), slice(half, outputs)
        if where.interleaved:
            gate, up = slice(0, outputs, 2), slice(1, outputs, 2)
        parts = [("gate_proj", gate), ("up_proj", up)]
    parent = joined(name, where.module if where.name == projection else "")
    return [
        Place(joined(parent, str(expert), part), expert, rows)
        for expert in range(layer.record.num_experts)
        for part, rows in parts
    ]


def place_tensors(places: Sequence[Place], factors: Factors, ranks: Sequence[int]) -> Tensors:
    """Two-dimensional tensors; ``ranks`` has that of each expert, the rest is cut off."""
    named: Tensors = {}
    for name, expert, rows in places:
        rank = ranks[expert]
        named[f"{PREFIX}{name}.lora_A.weight"] = factors.lora_A[expert, :rank].clone()
        named[f"{PREFIX}{name}.lora_B.weight"] = factors.lora_B[expert, rows, :rank].clone()
    return named


def take_places(
    held: Tensors, config: PeftConfig, places: Sequence[Place], outputs: int
) -> list[Expert]:
    """Take the LoRA at some places out of ``held``, scaled for a scaling of 1; empty if none is."""
    if not any(f"{PREFIX}{place.name}.lora_A.weight" in held for place in places):
        return []
    experts: dict[int, list[Expert]] = {}
    for name, expert, rows in places:
        try:
            lora_A, part = (held.pop(f"{PREFIX}{name}.lora_{each}.weight") for each in "AB")
            lora_B = part.new_zeros(outputs, part.shape[1])
            lora_B[rows] = config.scaling(name) * part
            if part.shape[1] != lora_A.shape[0]:
                raise ValueError("A and B differ in rank")
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"incomplete or ill-shaped LoRA of {name!r}: {error}") from error
        experts.setdefault(expert, []).append((lora_A, lora_B))
    return [_join(experts[expert]) for expert in sorted(experts)]


def _join(parts: Sequence[Expert]) -> Expert:
    """A and B of one expert: parts with the same A share it, else their ranks add up."""
    all_A, all_B = zip(*parts, strict=True)
    if all(torch.equal(all_A[0], lora_A) for lora_A in all_A):
        return all_A[0], torch.stack(all_B).sum(dim=0)
    return torch.cat(all_A), torch.cat(all_B, dim=1)
