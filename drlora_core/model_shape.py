"""The MoE layers of a model as plain numbers, and a small reader of config.json.

The reader knows the field names that most families share and needs no other library. Where
Transformers is installed, ``drlora plan`` asks :mod:`drlora_torch.models.shapes` first, which knows
every family.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from drlora_core.errors import LayoutError, shorten

LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 400
"""More than any published model has; Transformers takes some milliseconds to build each."""
# Field names, the most specific first.
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
HIDDEN = ("moe_latent_size", "hidden_size")
INTERMEDIATE = ("moe_intermediate_size", "intermediate_size")
VOCABULARY = ("vocab_size",)
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
# Fields by which some families choose their MoE layers, which this reader does not interpret; and
# the value that changes nothing.
OTHER_RULES = {
    "moe_layer_freq": 1,
    "interleave_moe_layer_step": 1,
    "expert_layer_period": 1,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 0,
    "num_dense_layers": 0,
    "moe_layers": None,
    "layers_block_type": None,
    "hybrid_override_pattern": None,
}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerShape:
    """One MoE layer."""

    index: int  # number of the decoder layer, from 0
    num_experts: int
    projections: Mapping[str, tuple[int, int]]  # input and output size, by name, of one expert

    @property
    def slot_parameters(self) -> int:
        """LoRA parameters of one rank of one expert: the sum of in + out of its projections."""
        return sum(inner + outer for inner, outer in self.projections.values())

    @property
    def expert_parameters(self) -> int:
        """Parameters of the frozen weights of all its experts."""
        return self.num_experts * sum(inner * outer for inner, outer in self.projections.values())


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """The MoE layers of a model."""

    model_type: str
    num_layers: int  # all decoder layers, dense ones too
    layers: tuple[LayerShape, ...]
    total_parameters: int | None = None  # of the whole model; None: only config.json was read
    hidden_size: int | None = None  # width between layers; None: not known, as are the following
    vocab_size: int | None = None
    experts_per_token: int | None = None


class TokenSizes(TypedDict):
    """Fields of :class:`ModelShape` that say how much a token takes."""

    hidden_size: int | None
    vocab_size: int | None
    experts_per_token: int | None


def token_sizes(config: Mapping[str, Any]) -> TokenSizes:
    """Read what a token takes from the fields of a config.json; None for what it does not say.

    Raises:
        LayoutError: a size is negative, or larger than that of any model.
    """

    def find(names: tuple[str, ...]) -> int | None:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if not 0 <= value <= LARGEST_SIZE:
                    raise LayoutError(
                        f"{name} is {shorten(value)}; accepted: whole numbers from 0 to "
                        f"{LARGEST_SIZE}"
                    )
                return value
        return None

    return TokenSizes(
        hidden_size=find(("hidden_size", "d_model")),
        vocab_size=find(VOCABULARY),
        experts_per_token=find(EXPERTS_PER_TOKEN),
    )


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

    The other arguments replace what the file says; ``moe_layers`` layers are counted from layer 0.
    A LayoutError says what this reader cannot find.
    """
    path = Path(path)
    values = read_json(path)
    text = values.get("text_config")
    config = dict(text if text and isinstance(text, dict) else values)
    given = ((EXPERTS, num_experts), (HIDDEN, hidden_size), (INTERMEDIATE, intermediate_size))
    for names, value in given:
        if value is not None:
            config |= dict.fromkeys(names) | {names[-1]: value}
    if config.get("num_hidden_layers") is None:
        config["num_hidden_layers"] = moe_layers
    experts = _size(path, config, EXPERTS, "--num-experts")
    total = _size(path, config, ("num_hidden_layers",), "--moe-layers")
    _check_total(path, total)
    hidden = _size(path, config, HIDDEN, "--hidden-size")
    width = _size(path, config, INTERMEDIATE, "--intermediate-size")
    kind = str(values.get("model_type", "unknown"))
    gated = kind != "nemotron_h" if gated is None else gated
    up = {"gate_up_proj": (hidden, 2 * width)} if gated else {"up_proj": (hidden, width)}
    projections = up | {"down_proj": (width, hidden)}
    indices = _moe_layers(path, config, total) if moe_layers is None else range(moe_layers)
    if len(indices) > total:
        raise LayoutError(f"{moe_layers} MoE layers are given, but {path} has {total} layers")
    if not indices or experts == 1:
        raise LayoutError(f"{path} has no MoE layer: every layer is dense; use --moe-layers")
    layers = tuple(LayerShape(i, experts, projections) for i in indices)
    return ModelShape(kind, total, layers, **token_sizes(config))


def read_json(path: Path) -> dict[str, Any]:
    """Read a config.json, or that of a directory."""
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise LayoutError(f"{path} is a JSON {type(values).__name__}, not a model's configuration")
    check_depths(path, values)
    return values


def check_depths(path: Path, values: dict[str, Any]) -> None:
    """Refuse too many layers, also of parts such as a vision tower, before any is built.

    Raises:
        LayoutError: names the field, and says how many are accepted.
    """
    parts: list[Any] = [values]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            for name, value in part.items():
                if isinstance(value, int) and name.endswith(("layers", "n_layer", "depth")):
                    _check_total(path, value, name)
            part = part.values()
        parts.extend(each for each in part if isinstance(each, (dict, list)))


def _check_total(path: Path, layers: int, name: str = "the number of decoder layers") -> None:
    if layers > MOST_LAYERS:
        raise LayoutError(f"{path}: {name} is {shorten(layers)}; accepted: at most {MOST_LAYERS}")


def _size(path: Path, config: Mapping[str, Any], names: tuple[str, ...], option: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return _positive(path, name, config[name])
    raise LayoutError(
        f"{path} has no field {' or '.join(names)}; use {option}, or install drlora[torch], which "
        f"knows every family"
    )


def _positive(path: Path, name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_SIZE:
        raise LayoutError(
            f"{path}: {name} is {shorten(value)}; accepted: whole numbers from {least} to "
            f"{LARGEST_SIZE}"
        )
    return value


def _list(path: Path, config: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(value := config.get(name) or [], list):
        raise LayoutError(f"{path}: {name} is {shorten(value)}; accepted: a list")
    return value


def _moe_layers(path: Path, config: Mapping[str, Any], total: int) -> list[int]:
    """Return the indices of the MoE layers; all layers where no field says otherwise."""
    if types := _list(path, config, "mlp_layer_types"):
        if len(types) != total:
            raise LayoutError(f"{path}: mlp_layer_types does not fit the {total} layers")
        return [index for index, kind in enumerate(types) if kind == "sparse"]
    for name, harmless in OTHER_RULES.items():
        if config.get(name) not in (None, harmless):
            raise LayoutError(
                f"{path}: this reader does not know {name}, which says which layers have experts; "
                f"use --moe-layers, or install drlora[torch], which knows every family"
            )
    dense = _positive(
        path, "first_k_dense_replace", config.get("first_k_dense_replace") or 0, least=0
    )
    step = _positive(path, "decoder_sparse_step", config.get("decoder_sparse_step") or 1)
    left_out = _list(path, config, "mlp_only_layers")
    return [i for i in range(dense, total) if i not in left_out and (i + 1) % step == 0]
