"""Export to a standard PEFT LoRA directory, which ``PeftModel.from_pretrained`` loads.

How PEFT adapts a layer depends on where the layer keeps its weights: see
:mod:`drlora_torch.storage.peft.stacked` for parameters of all experts, and
:mod:`drlora_torch.storage.peft.linears` for Linears.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.lifecycle.routers import trained_routers
from drlora_torch.models.location import ExpertLinears
from drlora_torch.options import RouterMode
from drlora_torch.storage.peft import files, linears, per_expert, stacked
from drlora_torch.storage.peft.factors import Factors, Uniform, of_rank, padded
from drlora_torch.storage.peft.names import PREFIX, own_name
from drlora_torch.storage.peft.places import Places, locations, parameters_of


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote."""

    path: Path
    """The directory."""
    ranks: Mapping[str, int]
    """Rank of each layer's experts; the largest, where every expert keeps its own."""
    errors: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Relative Frobenius error of B A by layer, projection and expert, [N]; 0 is exact."""

    @property
    def largest_error(self) -> float:
        """The largest error of all experts; 0 without compression."""
        return max(float(e.max()) for layer in self.errors.values() for e in layer.values())


def export(attached: Attached, path: Path, rank: int | None, separate: bool) -> ExportReport:
    """Carry out :meth:`drlora_torch.Adapter.export_peft`; ``separate`` is its ``per_expert``."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank!r}")
    uniform = _uniform(attached, rank, across_layers=separate)
    report = ExportReport(
        path,
        {name: next(iter(of.values())).factors.rank for name, of in uniform.items()},
        {name: {p: each.error for p, each in of.items()} for name, of in uniform.items()},
    )
    factors = {name: {p: e.factors for p, e in of.items()} for name, of in uniform.items()}
    config = _config(attached, report)
    if separate:
        tensors = _write_separate(attached, factors, config)
    else:
        tensors = _write_as_peft(attached, factors, config, keep_ranks=rank is None)
    _add_routers(attached, config, tensors)
    files.write(report.path, tensors, config)
    return report


def _uniform(
    attached: Attached, rank: int | None, across_layers: bool
) -> dict[str, dict[str, Uniform]]:
    """Factors of one rank for each layer, or for all layers."""
    own_ranks = {
        name: {p: padded(layer.lora, p) for p, _ in layer.lora.items()}
        for name, layer in attached.layers.items()
    }
    largest = max(factors.rank for of in own_ranks.values() for factors in of.values())
    common = largest if across_layers and rank is None else rank
    return {
        name: {p: of_rank(factors, common or factors.rank) for p, factors in of.items()}
        for name, of in own_ranks.items()
    }


def _config(attached: Attached, report: ExportReport) -> dict[str, Any]:
    """Build PEFT's LoraConfig; scaling alpha / r of every module is ours."""
    rank = max(report.ranks.values())
    own_config = getattr(attached.model, "config", None)
    causal = "ForCausalLM" in str(getattr(own_config, "architectures", None)) or type(
        attached.model
    ).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(own_config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(attached, rank),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [],
        "target_parameters": None,
        "modules_to_save": None,
    }


def _alpha(attached: Attached, rank: int) -> float:
    """Alpha at which alpha / r is our scaling; an integer where it is one."""
    alpha = attached.options.scaling(attached.engine.config) * rank
    return int(alpha) if alpha.is_integer() else alpha


def _write_separate(
    attached: Attached, factors: Mapping[str, Mapping[str, Factors]], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Tensors of every expert; engines take one rank, and names of modules without their path."""
    places = Places(attached)
    tensors: dict[str, Tensor] = {}
    modules = set()
    for name, layer in attached.layers.items():
        for projection, both in factors[name].items():
            found = places.of(name, projection)
            modules |= {place.name.rpartition(".")[2] for place in found}
            tensors |= per_expert.tensors(found, both, [both.rank] * layer.record.num_experts)
    config["target_modules"] = sorted(modules)
    return tensors


def _write_as_peft(
    attached: Attached,
    factors: Mapping[str, Mapping[str, Factors]],
    config: dict[str, Any],
    *,
    keep_ranks: bool,
) -> dict[str, Tensor]:
    """Tensors as PEFT would save them, and what the configuration says of their modules."""
    tensors: dict[str, Tensor] = {}
    parameters, modules = [], []
    for name, layer in attached.layers.items():
        of = factors[name]
        for target in stacked.targets(layer.experts, own_name(name), parameters_of(layer)):
            lora_A, lora_B = stacked.flat(of[target.projection], target)
            tensors[f"{PREFIX}{target.key}.lora_A.weight"] = lora_A
            tensors[f"{PREFIX}{target.key}.lora_B.weight"] = lora_B
            parameters.append(target.parameter)
            _set_rank(config, attached, target.parameter, of[target.projection].rank)
        held = [each for each in locations(layer).values() if isinstance(each, ExpertLinears)]
        if held:
            largest = next(iter(of.values())).rank
            ranks = _ranks(layer) if keep_ranks else [largest] * layer.record.num_experts
            modules.append(linears.groups(own_name(name), held, ranks))
            tensors |= _of_linears(layer, own_name(name), of, ranks)
    for rank, groups in linears.by_rank(modules).items():
        _set_rank(config, attached, linears.pattern(groups), rank)
    config["target_parameters"] = parameters or None
    if modules:
        config["target_modules"] = linears.pattern(g for of in modules for g in of.values())
    return tensors


def _of_linears(
    layer: AdaptedLayer, name: str, factors: Mapping[str, Factors], ranks: list[int]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for projection, where in locations(layer).items():
        shape = layer.record.projections[projection]
        places = per_expert.own_places(name, projection, where, shape, len(ranks))
        tensors |= per_expert.tensors(places, factors[projection], ranks)
    return tensors


def _ranks(layer: AdaptedLayer) -> list[int]:
    """Rank of each expert; PEFT has none of 0."""
    return [max(rank, 1) for rank in layer.lora.table.ranks().tolist()]


def _set_rank(config: dict[str, Any], attached: Attached, pattern: str, rank: int) -> None:
    if rank != config["r"]:
        config["rank_pattern"][pattern] = rank
        config["alpha_pattern"][pattern] = _alpha(attached, rank)


def _add_routers(attached: Attached, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Routers that learned are whole modules to PEFT, not LoRA."""
    if attached.options.router is RouterMode.FROZEN:
        return
    trained = trained_routers(attached)
    names = sorted({own_name(_router(layer)) for layer in attached.layers.values()})
    config["modules_to_save"] = names
    for layer in attached.layers.values():
        assert layer.router is not None
        for part, value in layer.router.state_dict().items():
            qualified = f"{_router(layer)}.{part}"
            value = trained.get(qualified, value)  # noqa: PLW2901
            tensors[PREFIX + own_name(qualified)] = value.detach().cpu()


def _router(layer: AdaptedLayer) -> str:
    assert layer.record.router is not None
    return layer.record.router
