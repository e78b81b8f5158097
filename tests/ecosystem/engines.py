"""How serving engines read an adapter directory, as their loaders do, rule by rule.

Written from the sources named in docs/ecosystem.md, not from our exporter. Engines themselves need
a GPU and are not part of the tests.

Shape letters: N experts, r rank, I and O input and output features.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor


class Loaded(NamedTuple):
    """What an engine multiplies with, by experts module and projection."""

    lora_A: Tensor  # [N, r, I]
    lora_B: Tensor  # [N, O, r]
    scaling: float

    def delta(self, expert: int) -> Tensor:
        """Weight change of one expert, [O, I]."""
        return self.scaling * (self.lora_B[expert] @ self.lora_A[expert])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((path / "adapter_config.json").read_text())
    return config, load_file(path / "adapter_model.safetensors")


# -- vLLM --------------------------------------------------------------------------------------


def vllm_scaling(config: dict[str, Any], max_lora_rank: int) -> float:
    """``PEFTHelper``: what it needs, what it refuses, and how it scales; patterns are unknown."""
    missing = {"r", "lora_alpha", "target_modules"} - set(config)
    if missing:
        raise ValueError(f"Missing required configuration fields: {missing}")
    if config.get("modules_to_save"):
        raise ValueError("vLLM only supports modules_to_save being None")
    if config.get("use_dora"):
        raise ValueError("vLLM does not yet support DoRA")
    if config.get("bias", "none") != "none":
        raise ValueError("Adapter bias is not supported")
    if config["r"] > max_lora_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / root)


def vllm_module(key: str) -> tuple[str, str]:
    """``parse_fine_tuned_lora_name``: module name and A or B."""
    parts = key.replace("base_model.model.", "").split(".")
    if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
        raise ValueError(f"{key} is unsupported LoRA weight")
    return ".".join(parts[:-2]), parts[-2]


def vllm_2d(
    path: Path, experts: int, projections: tuple[str, str, str], max_lora_rank: int
) -> dict[str, dict[str, Loaded]]:
    """Models with ``experts.{i}.{projection}`` in their expert mapping; gate, down, up."""
    config, held = read(path)
    scaling = vllm_scaling(config, max_lora_rank)
    expected = {f"experts.{i}.{projection}" for i in range(experts) for projection in projections}
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items():
        module, part = vllm_module(key)
        suffix = module[module.find(".experts") + 1 :]
        if suffix not in expected:
            raise ValueError(f"expected target modules in {expected} but received {module}")
        modules.setdefault(module, {})[part] = value
    layers = {module.rpartition(".experts.")[0] + ".experts" for module in modules}
    return {
        layer: {
            projection: _packed(
                [modules[f"{layer}.{i}.{projection}"] for i in range(experts)], scaling
            )
            for projection in projections
        }
        for layer in layers
    }


def _packed(experts: list[dict[str, Tensor]], scaling: float) -> Loaded:
    lora_A, lora_B = (torch.stack([each[p] for each in experts]) for p in ("lora_A", "lora_B"))
    return Loaded(lora_A, lora_B, scaling)


def vllm_3d(path: Path, experts: int, max_lora_rank: int) -> dict[str, dict[str, Loaded]]:
    """Models with ``is_3d_moe_weight``: ``experts.base_layer`` is gate_up, ``experts`` is down."""
    config, held = read(path)
    scaling = vllm_scaling(config, max_lora_rank)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items():
        module, part = vllm_module(key)
        if "base_layer" not in key and not module.endswith(".experts"):
            raise ValueError(f"received {module}")
        modules.setdefault(module, {})[part] = value
    found: dict[str, dict[str, Loaded]] = {}
    for layer in {module.removesuffix(".base_layer") for module in modules}:
        parts = {"gate_up": modules[f"{layer}.base_layer"], "down": modules[layer]}
        found[layer] = {
            name: Loaded(
                both["lora_A"].reshape(experts, -1, both["lora_A"].shape[-1]),
                both["lora_B"].reshape(len(both["lora_B"]), -1, experts).permute(2, 0, 1),
                scaling,
            )
            for name, both in parts.items()
        }
    return found


# -- SGLang ------------------------------------------------------------------------------------


def sglang(path: Path, experts: int) -> dict[int, dict[str, Loaded]]:
    """``LoRAAdapter``: by layer number, gate and up stacked, w1, w2, w3 renamed; alpha / r."""
    config, held = read(path)
    assert config["peft_type"].lower() == "lora"
    assert isinstance(config["target_modules"], list)
    scaling = config["lora_alpha"] / config["r"]
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in held.items():
        number = re.search(r"layers\.(\d+)\.", key)
        assert number is not None
        for old, new in ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")):
            key = key.replace(old, new)  # noqa: PLW2901
        layers.setdefault(int(number[1]), {})[key] = value
    return {number: _sglang_layer(weights, experts, scaling) for number, weights in layers.items()}


def _sglang_layer(weights: dict[str, Tensor], experts: int, scaling: float) -> dict[str, Loaded]:
    for key in [key for key in weights if "gate_proj" in key]:
        up = key.replace("gate_proj", "up_proj")
        both = torch.cat((weights.pop(key), weights.pop(up)), 0)
        weights[key.replace("gate_proj", "gate_up_proj")] = both
    held: dict[tuple[str, str], dict[int, Tensor]] = {}
    for key, value in weights.items():
        match = re.search(r"experts\.(\d+)\.(\w+)\.(lora_[AB])", key)
        assert match is not None
        held.setdefault((match[2], match[3]), {})[int(match[1])] = value
    return {
        projection: _packed(
            [{p: held[projection, p][i] for p in ("lora_A", "lora_B")} for i in range(experts)],
            scaling,
        )
        for projection in {name for name, _ in held}
    }
