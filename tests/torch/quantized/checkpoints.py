"""Small FP8 and MXFP4 checkpoints, as the hub has them, made from random models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Quantize

TILE = (16, 16)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(TILE)}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
UNQUANTIZED = ("embed", "lm_head", "mlp.gate.", "norm")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
}


def gpt_oss(**changes: Any) -> Any:
    config = transformers.GptOssConfig(
        **{**SIZES, **changes},
        intermediate_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return build(transformers.GptOssForCausalLM, config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SIZES,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
    )
    return build(transformers.Qwen3MoeForCausalLM, config)


def deepseek_v3() -> Any:
    """A dense first layer, shared experts, and experts whose names are merged while loading."""
    config = transformers.DeepseekV3Config(
        **SIZES,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=2,
        topk_group=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        n_shared_experts=1,
    )
    return build(transformers.DeepseekV3ForCausalLM, config)


def build(kind: Any, config: Any) -> Any:
    """A bfloat16 model whose outputs depend on its experts; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                nn.init.normal_(parameter, 0.0, 0.1)
    return model.bfloat16()


def write_mxfp4(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Write gpt-oss with random blocks and scales; return what the file has."""
    gpt_oss(**changes).save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        count, inner, outer = weight.shape
        blocks = (count, outer, inner // 32, 16)
        tensors[f"{name}_blocks"] = _bytes(0, 256, blocks, generator)
        tensors[f"{name}_scales"] = _bytes(118, 124, blocks[:3], generator)
    _replace(folder, tensors, MXFP4)
    return tensors


def _bytes(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def write_fp8(
    model: Any, folder: Path, scale_format: str = "float", left: str | None = None
) -> None:
    """Write a model with its Linears and experts in FP8, each expert under a name of its own.

    What has ``left`` in its name stays as it is.
    """
    model.save_pretrained(folder)
    settings = SimpleNamespace(weight_block_size=TILE, scale_fmt=scale_format)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        kept = (*UNQUANTIZED, *((left,) if left else ()))
        if weight.dim() == 2 and not any(each in name for each in kept):
            tensors |= quantize.convert({name: weight})
        else:
            tensors[name] = weight
    skipped = {"modules_to_not_convert": [f"model.{left}"]} if left else {}
    _replace(folder, tensors, {**FP8, "scale_fmt": scale_format, **skipped})


def _replace(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantization}))
