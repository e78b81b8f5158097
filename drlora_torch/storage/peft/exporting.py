"""Export to a standard PEFT LoRA directory, which ``PeftModel.from_pretrained`` loads.

How PEFT adapts a layer depends on where the layer keeps its weights. Of a parameter of all experts
it has one rank, see :mod:`drlora_torch.storage.peft.stacked`; of a Linear per expert
(``target_modules``) every expert keeps its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.lifecycle.routers import trained_routers
from drlora_torch.models.location import ExpertLinears
from drlora_torch.options import RouterMode
from drlora_torch.storage.peft import files, per_expert, places, stacked
from drlora_torch.storage.peft.factors import Factors, FloatArray, read_slots, resize
from drlora_torch.storage.peft.places import PREFIX, own_name

AllFactors = Mapping[tuple[str, str], Factors]
"""By layer and projection."""
Linear = tuple[str, str, str]
"""Names of a layer, of an expert in it, and of a Linear in the expert."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote."""

    path: Path
    """The directory."""
    ranks: Mapping[str, int]
    """Rank of each layer's experts; the largest, where every expert keeps its own."""
    errors: Mapping[str, Mapping[str, FloatArray]]
    """Relative Frobenius error of B A by layer, projection and expert, [N]; 0 is exact."""

    @property
    def largest_error(self) -> float:
        """The largest error of all experts; 0 without compression."""
        return max(float(e.max()) for layer in self.errors.values() for e in layer.values())


def export(attached: Attached, path: Path, rank: int | None, separate: bool) -> ExportReport:
    """Carry out :meth:`drlora_torch.Adapter.export_peft`; ``separate`` is its ``per_expert``."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank!r}")
    ranks = {
        name: rank or max(int(layer.lora.table.ranks().max()), 1)
        for name, layer in attached.layers.items()
    }
    if separate:  # serving engines take one rank
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    factors: dict[tuple[str, str], Factors] = {}
    errors: dict[str, dict[str, FloatArray]] = {name: {} for name in attached.layers}
    for name, layer in attached.layers.items():
        for projection, slots in layer.lora.items():
            factors[name, projection], errors[name][projection] = resize(
                read_slots(layer.lora, slots), ranks[name]
            )
    if separate:
        tensors, fields = _for_engines(attached, factors)
    else:
        tensors, fields = _for_peft(attached, factors, keep_ranks=rank is None)
    tensors |= _routers(attached)
    files.write(path, tensors, _config(attached, max(ranks.values()), fields))
    return ExportReport(path, ranks, errors)


def _for_engines(
    attached: Attached, factors: AllFactors
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One LoRA per expert; engines take the names of modules without their path."""
    tensors: dict[str, Tensor] = {}
    modules = set()
    for key, (preferred, *_) in places.namings(attached).items():
        modules |= {place.name.rpartition(".")[2] for place in preferred}
        experts, rank, _ = factors[key].lora_A.shape
        tensors |= per_expert.tensors(preferred, factors[key], [rank] * experts)
    return tensors, {"target_modules": sorted(modules)}


def _for_peft(
    attached: Attached, factors: AllFactors, *, keep_ranks: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as PEFT would save them, and what the configuration says of their modules."""
    tensors: dict[str, Tensor] = {}
    patterns: dict[str, int] = {}
    linears: dict[Linear, int] = {}
    for name, layer in attached.layers.items():
        targets = stacked.targets(layer, places.parameters_of(layer))
        for projection, where in places.locations(layer).items():
            both = factors[name, projection]
            experts, rank, _ = both.lora_A.shape
            if isinstance(where, ExpertLinears):
                ranks = [rank] * experts
                if keep_ranks:  # PEFT has no rank 0
                    ranks = [max(own, 1) for own in layer.lora.table.ranks().tolist()]
                named = places.own_places(layer, projection, where)
                tensors |= per_expert.tensors(named, both, ranks)
                for expert, own in zip(where.experts, ranks, strict=True):
                    linears[own_name(name), expert, where.projection] = own
            else:
                target = targets[projection]
                tensors |= stacked.tensors(both, target)
                patterns[target.parameter] = rank
    fields: dict[str, Any] = {"target_parameters": list(patterns) or None}
    if linears:
        fields["target_modules"] = pattern(linears)
    for rank in dict.fromkeys(linears.values()):
        patterns[pattern(linear for linear, own in linears.items() if own == rank)] = rank
    return tensors, {**fields, "rank_pattern": patterns}


def pattern(linears: Iterable[Linear]) -> str:
    r"""Regular expression of the names of Linears, to match in full.

    All experts of a layer have the same Linears. PEFT tries every pattern for every module, so
    there is one for each rank: one for each expert would cost the square of their number.

    Example:
        >>> pattern([("layers.0", "experts.0", "w1"), ("layers.0", "experts.0", "w2"),
        ...          ("layers.1", "experts.0", "w1"), ("layers.1", "experts.0", "w2")])
        '(?:layers\\.0|layers\\.1)\\.(?:experts\\.0)\\.(?:w1|w2)'
    """
    parts: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # ordered sets
    for layer, expert, projection in linears:
        experts, projections = parts.setdefault(layer, ({}, {}))
        experts[expert] = projections[projection] = None
    layers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for layer, (experts, projections) in parts.items():
        layers.setdefault((tuple(experts), tuple(projections)), []).append(layer)
    return "|".join(
        r"\.".join(
            f"(?:{'|'.join(map(re.escape, names))})" for names in (alike, *rest) if any(names)
        )
        for rest, alike in layers.items()
    )


def _routers(attached: Attached) -> dict[str, Tensor]:
    """Routers that learned, which are whole modules to PEFT."""
    if attached.options.router is RouterMode.FROZEN:
        return {}
    trained = trained_routers(attached)
    tensors = {}
    for layer in attached.layers.values():
        assert layer.router is not None
        for part, value in layer.router.state_dict().items():
            name = f"{layer.record.router}.{part}"
            tensors[PREFIX + own_name(name)] = trained.get(name, value).detach().cpu()
    return tensors


def _config(attached: Attached, rank: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that differ from its defaults, or that readers expect.

    Scaling alpha / r of every module is ours.
    """
    own_config = getattr(attached.model, "config", None)
    architectures = (type(attached.model).__name__, getattr(own_config, "architectures", None))
    patterns = {name: own for name, own in fields.get("rank_pattern", {}).items() if own != rank}
    learned = attached.options.router is not RouterMode.FROZEN
    routers = sorted({own_name(str(layer.record.router)) for layer in attached.layers.values()})

    def alpha(rank: int) -> float:
        exact = attached.options.scaling(attached.engine.config) * rank
        return int(exact) if exact.is_integer() else exact

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if "ForCausalLM" in str(architectures) else None,
        "base_model_name_or_path": getattr(own_config, "_name_or_path", None) or None,
        "target_modules": [],
        "target_parameters": None,
        "modules_to_save": routers if learned else None,
        **fields,
        "r": rank,
        "lora_alpha": alpha(rank),
        "rank_pattern": patterns,
        "alpha_pattern": {name: alpha(own) for name, own in patterns.items()},
    }
