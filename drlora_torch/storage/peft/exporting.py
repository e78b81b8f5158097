"""Export to a standard PEFT LoRA directory, which ``PeftModel.from_pretrained`` loads.

How PEFT adapts a layer depends on where the layer keeps its weights. Of a parameter of all experts
it has one rank, see :mod:`drlora_torch.storage.peft.layouts`; of a Linear per expert
(``target_modules``) every expert keeps its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drlora_torch.attached import Attached
from drlora_torch.step.parameters import all_names
from drlora_torch.storage import checkpoint
from drlora_torch.storage.peft import dense, files, layouts
from drlora_torch.storage.peft.factors import FloatArray, read_slots, resize
from drlora_torch.storage.peft.files import PREFIX, Linear, own_name, pattern


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
    checkpoint.check_finite(attached)
    own_ranks = {  # at least 1: PEFT has no rank 0
        name: [max(own, 1) for own in layer.lora.table.ranks().tolist()]
        for name, layer in attached.layers.items()
    }
    ranks = {name: rank or max(own) for name, own in own_ranks.items()}
    if separate:  # serving engines take one rank
        ranks = dict.fromkeys(ranks, dense.common_rank(attached, rank, max(ranks.values())))
    errors: dict[str, dict[str, FloatArray]] = {name: {} for name in attached.layers}
    tensors = {
        PREFIX + own_name(key): value.detach().to("cpu", copy=True)  # they may share memory
        for key, value in files.module_values(attached).items()
    }
    parameters: dict[str, int] = {}
    linears: dict[Linear, int] = {}
    namings = layouts.namings(attached) if separate else {}
    for name, layer in attached.layers.items():
        targets = {} if separate else layouts.stacked(layer)
        same = rank is not None or separate
        expert_ranks = [ranks[name]] * len(own_ranks[name]) if same else own_ranks[name]
        for projection, slots in layer.lora.items():
            experts = read_slots(layer.lora, slots)
            factors, errors[name][projection] = resize(experts, ranks[name])
            if projection in targets:
                tensors |= targets[projection].tensors(factors)
                parameters[targets[projection].parameter] = ranks[name]
                continue
            places = layouts.own_places(layer, projection)
            if separate:
                places = namings[name, projection][0]
            tensors |= layouts.place_tensors(places, factors, expert_ranks)
            for place in places:
                expert, _, linear = place.name.removeprefix(f"{own_name(name)}.").rpartition(".")
                linears[own_name(name), expert, linear] = expert_ranks[place.expert]
    config = _config(attached, max(ranks.values()), parameters, linears, separate)
    tensors |= dense.export(attached, config, separate)
    files.write(path, tensors, config)
    return ExportReport(path, ranks, errors)


def _config(
    attached: Attached,
    rank: int,
    parameters: Mapping[str, int],
    linears: Mapping[Linear, int],
    separate: bool,
) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that readers expect or that differ from its defaults.

    Parameters and Linears come with their ranks; alpha / r of each is our scaling.
    """
    own_config = getattr(attached.model, "config", None)
    architectures = (type(attached.model).__name__, getattr(own_config, "architectures", None))
    modules: list[str] | str = pattern(linears) if linears else []
    if separate:  # engines take the names of modules without their path
        modules = sorted({name for _, _, name in linears})
    whole = sorted({own_name(name) for name in files.whole_modules(attached)})
    tied = any(len(names) > 1 for names in all_names(attached).values())
    patterns = {name: own for name, own in parameters.items() if own != rank}
    for other in dict.fromkeys(own for own in linears.values() if own != rank):
        patterns[pattern(linear for linear, own in linears.items() if own == other)] = other

    def alpha(rank: int) -> float:
        return files.number(attached.options.scaling(attached.engine.config) * rank)

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if "ForCausalLM" in str(architectures) else None,
        "base_model_name_or_path": getattr(own_config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha(rank),
        "rank_pattern": patterns,
        "alpha_pattern": {name: alpha(own) for name, own in patterns.items()},
        "target_modules": modules,
        "target_parameters": list(parameters) or None,
        "modules_to_save": whole or None,
        **({"ensure_weight_tying": True} if tied else {}),
    }
