"""Reading the MoE layers of a model from its config.json, as plain JSON.

Families name the same things differently; the names known here are those of Transformers. What
cannot be read is refused, and every value can be given by hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drlora_core.errors import LayoutError

EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "moe_num_primary_experts",
)
HIDDEN = ("moe_hidden_size", "moe_latent_size", "hidden_size", "d_model", "n_embd")
INTERMEDIATE = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "expert_intermediate_size",
    "intermediate_size",
    "ffn_hidden_size",
    "d_ff",
)
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
LISTS = ("mlp_layer_types", "moe_layers", "layers_block_type", "hybrid_override_pattern")
SPARSE = ("sparse", "moe", "hash_moe", "E")
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
UNGATED = ("nemotron_h", "switch_transformers", "nllb-moe")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """The MoE layers of a model."""

    model_type: str
    hidden_size: int
    """H, input and output of an expert."""
    intermediate_size: int
    """I, inner width of one expert."""
    num_layers: int
    """All decoder layers, dense ones too."""
    experts: Mapping[int, int]
    """Experts N of each MoE layer, by the layer's index."""
    gated: bool = True
    """Whether experts have a gate beside the up projection."""

    @property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return sum(self.experts.values())

    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output size of an expert's adapted projections (fused, as in Transformers)."""
        up = "gate_up_proj" if self.gated else "up_proj"
        width = (2 if self.gated else 1) * self.intermediate_size
        return {
            up: (self.hidden_size, width),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }

    def expert_parameters(self) -> int:
        """Parameters of the frozen expert weights of all MoE layers."""
        sizes = self.projections().values()
        return self.num_experts * sum(inner * outer for inner, outer in sizes)


def read_model_config(
    path: str | Path,
    *,
    num_experts: int | None = None,
    moe_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    gated: bool | None = None,
) -> ModelShape:
    """Read the MoE layers from a config.json, or from a directory that has one.

    Args:
        path: the file or directory; nothing else of the model is looked at.
        num_experts: instead of what the file says; likewise the others.
        moe_layers: number of MoE layers, instead of working out which layers are.
        hidden_size: H.
        intermediate_size: I of one expert.
        gated: whether experts have a gate.

    Raises:
        LayoutError: not a model's configuration, or one without (readable) experts.
        OSError: the file cannot be read.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LayoutError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise LayoutError(f"{path} is a JSON {type(values).__name__}, not a model's configuration")
    config = _innermost(values)
    ffn = config.get("ffn_config")
    flat = config | (ffn if isinstance(ffn, dict) else {})
    kinds = flat.get("layers_block_type")
    if isinstance(kinds, list) and not any(flat.get(name) for name in LAYERS):
        flat["num_hidden_layers"] = len(kinds)
    total = _size(path, flat, LAYERS, "layers", None if any(map(flat.get, LAYERS)) else moe_layers)
    experts = _experts_by_layer(path, flat, total, num_experts, moe_layers)
    if not experts:
        raise LayoutError(
            f"{path} has no MoE layer: by its fields every layer is dense; give the number of MoE "
            f"layers by hand (--moe-layers)"
        )
    kind = str(values.get("model_type", "unknown"))
    return ModelShape(
        model_type=kind,
        hidden_size=_size(path, flat, HIDDEN, "hidden size", hidden_size),
        intermediate_size=_size(path, flat, INTERMEDIATE, "expert width", intermediate_size),
        num_layers=total,
        experts=experts,
        gated=kind not in UNGATED if gated is None else gated,
    )


def _innermost(values: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a multimodal configuration."""
    for name in NESTED:
        inner = values.get(name)
        if isinstance(inner, dict) and not any(values.get(field) for field in EXPERTS):
            return _innermost(inner)
    return values


def _size(
    path: Path, config: Mapping[str, Any], names: tuple[str, ...], what: str, given: int | None
) -> int:
    if given is not None:
        return _positive(path, what, given)
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if isinstance(value, list) and value and len(set(value)) == 1:
                value = value[0]
            return _positive(path, name, value)
    option = {"layers": "--moe-layers", "hidden size": "--hidden-size"}
    raise LayoutError(
        f"{path} does not give the {what}: none of {', '.join(names)}; give it by hand "
        f"({option.get(what, '--intermediate-size')})"
    )


def _positive(path: Path, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LayoutError(f"{path}: {name} is {value!r}; accepted: whole numbers above 0")
    return value


def _experts_by_layer(
    path: Path,
    config: Mapping[str, Any],
    total: int,
    num_experts: int | None,
    moe_layers: int | None,
) -> dict[int, int]:
    name = next((name for name in EXPERTS if config.get(name)), None)
    if num_experts is None and name is None:
        raise LayoutError(
            f"{path} names no experts (none of {', '.join(EXPERTS)}): a dense model, or a field "
            f"unknown here; give them by hand (--num-experts)"
        )
    value = num_experts if num_experts is not None else config[str(name)]
    counts = value if isinstance(value, list) else [value] * total
    if len(counts) != total:
        raise LayoutError(f"{path}: {name} lists {len(counts)} layers, there are {total}")
    if moe_layers is not None and moe_layers > total:
        raise LayoutError(f"{moe_layers} MoE layers are given, but {path} has {total} layers")
    indices = range(moe_layers) if moe_layers is not None else sparse_layers(path, config, total)
    found = {index: _positive(path, str(name), counts[index]) for index in indices}
    return {index: count for index, count in found.items() if count > 1}


def sparse_layers(path: Path, config: Mapping[str, Any], total: int) -> list[int]:
    """Indices of the MoE layers, by the rules that families use; all layers where none applies."""
    for name in LISTS:
        if config.get(name):
            return _listed(path, name, config[name], total)
    sparse = [True] * total
    for rule in (_deepseek, _qwen, _llama4, _jamba, _ernie):
        sparse = [is_ and rule(path, config, index) for index, is_ in enumerate(sparse)]
    return [index for index, is_ in enumerate(sparse) if is_]


def _listed(path: Path, name: str, value: Any, total: int) -> list[int]:
    """Families that list the kinds (or the indices) of their layers."""
    if name == "moe_layers" and isinstance(value, list):
        found = [index for index in value if isinstance(index, int) and 0 <= index < total]
        if len(found) == len(value):
            return found
    elif isinstance(value, (list, str)) and len(value) == total:
        return [index for index, kind in enumerate(value) if kind in SPARSE]
    raise LayoutError(f"{path}: {name} does not fit the {total} layers; use --moe-layers")


def _deepseek(path: Path, config: Mapping[str, Any], index: int) -> bool:
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        if index >= len(frequency):
            raise LayoutError(f"{path}: moe_layer_freq lists only {len(frequency)} layers")
        return bool(frequency[index])
    dense = config.get("first_k_dense_replace", config.get("num_dense_layers")) or 0
    return index >= dense and index % _positive(path, "moe_layer_freq", frequency or 1) == 0


def _qwen(path: Path, config: Mapping[str, Any], index: int) -> bool:
    step = _positive(path, "decoder_sparse_step", config.get("decoder_sparse_step") or 1)
    return index not in (config.get("mlp_only_layers") or []) and (index + 1) % step == 0


def _llama4(path: Path, config: Mapping[str, Any], index: int) -> bool:
    step = config.get("interleave_moe_layer_step") or 1
    return (index + 1) % _positive(path, "interleave_moe_layer_step", step) == 0


def _jamba(path: Path, config: Mapping[str, Any], index: int) -> bool:
    period = _positive(path, "expert_layer_period", config.get("expert_layer_period") or 1)
    return index % period == (config.get("expert_layer_offset") or 0) % period


def _ernie(path: Path, config: Mapping[str, Any], index: int) -> bool:
    start, end = config.get("moe_layer_start_index"), config.get("moe_layer_end_index")
    start = min(start) if isinstance(start, list) else start or 0
    end = max(end) if isinstance(end, list) else end
    step = _positive(path, "moe_layer_interval", config.get("moe_layer_interval") or 1)
    within = index >= start and (end is None or end < 0 or index <= end)
    return within and (index + 1) % step == 0
