"""Export to a standard PEFT LoRA directory, which ``PeftModel.from_pretrained`` loads.

PEFT adapts fused experts through ``target_parameters``, with one rank for all experts of a
parameter: smaller experts are padded with zeros, which changes nothing but memory. Each layer may
have its own rank (``rank_pattern``, ``alpha_pattern``, matched by the parameter's full name).

PEFT keeps the factors flat: lora_A [N*R, I] has the expert slowest, lora_B [O, R*N] has it fastest.
Several parameters of one module are wrappers within wrappers, in the order of the module's
parameters: the first is the innermost, and each ``base_layer`` of its key names one layer above it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from drlora_torch.errors import CheckpointError
from drlora_torch.export import per_expert, writing
from drlora_torch.export.factors import Factors, Uniform, of_rank, padded
from drlora_torch.models import interface
from drlora_torch.options import RouterMode

if TYPE_CHECKING:
    from drlora_torch.adapter import AdaptedLayer, Adapter

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote."""

    path: Path
    """The directory."""
    ranks: Mapping[str, int]
    """Common rank of each layer's experts."""
    errors: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Relative Frobenius error of B A by layer, projection and expert, [N]; 0 is exact."""

    @property
    def largest_error(self) -> float:
        """The largest error of all experts; 0 without compression."""
        return max(float(e.max()) for layer in self.errors.values() for e in layer.values())


def export(
    adapter: Adapter, path: str | os.PathLike[str], rank: int | None, separate: bool
) -> ExportReport:
    """See :meth:`drlora_torch.Adapter.export_peft`."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank!r}")
    check_conventions(adapter)
    uniform = _uniform(adapter, rank, across_layers=separate)
    report = ExportReport(
        Path(path),
        {name: next(iter(of.values())).factors.rank for name, of in uniform.items()},
        {name: {p: each.error for p, each in of.items()} for name, of in uniform.items()},
    )
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        factors = {projection: each.factors for projection, each in uniform[name].items()}
        write = per_expert.tensors if separate else stacked_tensors
        tensors |= write(layer.experts, PREFIX + own_name(name), factors)
    config = _config(adapter, report)
    if separate:
        config["target_modules"] = per_expert.target_modules(adapter.layers.values())
    else:
        _target_stacked(config, adapter, report)
    _add_routers(adapter, config, tensors)
    writing.write(report.path, tensors, config)
    return report


def check_conventions(adapter: Adapter) -> None:
    """Refuse layers whose weights PEFT would not find, or would read along other axes.

    Raises:
        CheckpointError: experts that do not follow the experts interface of Transformers 5.
    """
    for name, layer in adapter.layers.items():
        if not interface.matches(layer.experts):
            raise CheckpointError(
                f"layer {name!r} keeps its experts in a {type(layer.experts).__name__}; "
                "PEFT directories are of experts that follow the experts interface of "
                "Transformers 5"
            )


def own_name(name: str) -> str:
    """Name of a module in the model itself, where that is already inside a PeftModel."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def parameter_order(experts: nn.Module, projections: Mapping[str, Any]) -> list[str]:
    """Projections in the order in which PEFT wraps them."""
    return [name for name, _ in experts.named_parameters(recurse=False) if name in projections]


def stacked_tensors(
    experts: nn.Module, name: str, factors: Mapping[str, Factors]
) -> dict[str, Tensor]:
    """Flat tensors of one module under PEFT's keys; see the top of this file."""
    order = parameter_order(experts, factors)
    tensors = {}
    for index, projection in enumerate(order):
        key = stacked_key(name, len(order) - 1 - index)
        lora_A, lora_B = factors[projection]
        tensors[f"{key}.lora_A.weight"] = lora_A.flatten(0, 1)
        tensors[f"{key}.lora_B.weight"] = lora_B.permute(1, 2, 0).flatten(1)
    return tensors


def stacked_key(name: str, depth: int) -> str:
    """Key of a wrapper with ``depth`` others around it."""
    return name + ".base_layer" * depth


def _uniform(
    adapter: Adapter, rank: int | None, across_layers: bool
) -> dict[str, dict[str, Uniform]]:
    """Factors of one rank for each layer, or for all layers."""
    own = {
        name: {p: padded(layer.lora, p) for p, _ in layer.lora.items()}
        for name, layer in adapter.layers.items()
    }
    largest = max(factors.rank for of in own.values() for factors in of.values())
    common = largest if across_layers and rank is None else rank
    return {
        name: {p: of_rank(factors, common or factors.rank) for p, factors in of.items()}
        for name, of in own.items()
    }


def _config(adapter: Adapter, report: ExportReport) -> dict[str, Any]:
    """Build PEFT's LoraConfig; scaling alpha / r of every layer is ours."""
    rank = max(report.ranks.values())
    own_config = getattr(adapter.model, "config", None)
    causal = "ForCausalLM" in str(getattr(own_config, "architectures", None)) or type(
        adapter.model
    ).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(own_config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(adapter, rank),
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


def _alpha(adapter: Adapter, rank: int) -> float:
    """Alpha at which alpha / r is our scaling; an integer where it is one."""
    alpha = adapter.options.scaling(adapter.engine.config) * rank
    return int(alpha) if alpha.is_integer() else alpha


def _target_stacked(config: dict[str, Any], adapter: Adapter, report: ExportReport) -> None:
    targets = []
    for name, layer in adapter.layers.items():
        for projection, _ in layer.lora.items():
            target = f"{own_name(name)}.{projection}"
            targets.append(target)
            rank = report.ranks[name]
            if rank != config["r"]:
                config["rank_pattern"][target] = rank
                config["alpha_pattern"][target] = _alpha(adapter, rank)
    config["target_parameters"] = targets


def _add_routers(adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Routers that learned are whole modules to PEFT, not LoRA."""
    if adapter.options.router is RouterMode.FROZEN:
        return
    trained = adapter.trained_routers()
    names = sorted({own_name(_router(layer)) for layer in adapter.layers.values()})
    config["modules_to_save"] = names
    for layer in adapter.layers.values():
        assert layer.router is not None
        for part, value in layer.router.state_dict().items():
            qualified = f"{_router(layer)}.{part}"
            value = trained.get(qualified, value)  # noqa: PLW2901
            tensors[PREFIX + own_name(qualified)] = value.detach().cpu()


def _router(layer: AdaptedLayer) -> str:
    assert layer.record.router is not None
    return layer.record.router
