"""Tiny models of several families. No shape is square, so a wrong transpose cannot pass.

H = 32, I = 24, N = 8 experts, top 2, 2 layers. Weights are drawn with a large spread: at the usual
0.02 and this width the output would hardly depend on the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS, TOP_K, VOCABULARY = 32, 24, 8, 2, 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _olmoe(**changes: Any) -> nn.Module:
    config = transformers.OlmoeConfig(
        **{**SIZES, "intermediate_size": INNER, "num_experts": EXPERTS, **changes}
    )
    return transformers.OlmoeForCausalLM(config)


def _mixtral(**changes: Any) -> nn.Module:
    config = transformers.MixtralConfig(
        **{**SIZES, "intermediate_size": INNER, "num_local_experts": EXPERTS, **changes}
    )
    return transformers.MixtralForCausalLM(config)


def _qwen3_moe(**changes: Any) -> nn.Module:
    sizes = {"intermediate_size": 40, "moe_intermediate_size": INNER, "head_dim": 8}
    config = transformers.Qwen3MoeConfig(**{**SIZES, **sizes, "num_experts": EXPERTS, **changes})
    return transformers.Qwen3MoeForCausalLM(config)


def _qwen2_moe(**changes: Any) -> nn.Module:
    """Shared expert beside the routed ones, unnormalised routing weights."""
    sizes = {
        "intermediate_size": 40,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": 28,
        "num_experts": EXPERTS,
    }
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**{**SIZES, **sizes, **changes})
    )


def _deepseek_v3(**changes: Any) -> nn.Module:
    """A dense first layer, shared experts, sigmoid routing in groups scaled by 2.5."""
    sizes = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**SIZES, **sizes, **changes})
    )


def _gpt_oss(**changes: Any) -> nn.Module:
    """Transposed weights, interleaved gate and up, biases, a clamped gate of its own."""
    sizes = {
        "intermediate_size": INNER,
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**{**SIZES, **sizes, **changes})
    )


def _nemotron_h(**changes: Any) -> nn.Module:
    """Experts without a gate, of a width that is not the model's, shared experts."""
    sizes = {
        "layers_block_type": ["moe", "full_attention", "moe"],
        "num_hidden_layers": 3,
        "head_dim": 8,
        "intermediate_size": 40,
        "moe_intermediate_size": INNER,
        "moe_shared_expert_intermediate_size": 28,
        "moe_latent_size": 16,
        "n_routed_experts": EXPERTS,
    }
    return transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(**{**SIZES, **sizes, **changes})
    )


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "nemotron_h": _nemotron_h,
}


def build(
    family: str = "olmoe", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """Build a model with random weights, in training mode; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        model = FAMILIES[family](**changes)
    redraw(model, seed)
    return model.to(dtype).train()


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every weight anew with a spread at which experts and routers matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = 0.3 if "gate.weight" in name or "router" in name else 0.2
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def muse_spark_experts(dtype: torch.dtype) -> nn.Module:
    """Experts whose output passes a norm before the routing weight, of a width of their own."""
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    config = MuseSparkTextConfig(
        **{**SIZES, "moe_hidden_size": 16, "moe_intermediate_size": INNER},
        num_local_experts=EXPERTS,
    )
    experts = MuseSparkExperts(config)
    redraw(experts)
    return experts.to(dtype)


def tokens(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    """Draw token ids, int64 [rows, length], none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


class HandRouted(nn.Module):
    """Experts alone; the caller decides the routing."""

    def __init__(self, dtype: torch.dtype = torch.float32, family: str = "olmoe") -> None:
        super().__init__()
        self.experts = (
            muse_spark_experts(dtype)
            if family == "muse_spark"
            else next(
                module
                for module in build(family, dtype).modules()
                if type(module).__name__.endswith("Experts")
            )
        )

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the experts on [T, H] with a routing [T, K]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.experts(flat, top_k_index, top_k_weights)


def routing(
    num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0, top_k: int = TOP_K
) -> tuple[Tensor, Tensor]:
    """Draw distinct experts and positive weights for each token, [T, K] each."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(top_k, dim=-1)
    return index, weights.to(dtype)


def hidden(
    num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 1, width: int = HIDDEN
) -> Tensor:
    """Draw hidden states, [T, H]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(dtype)
