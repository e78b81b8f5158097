"""The families of small models that pretrain.py can make.

``olmoe`` is the embedded default. ``qwen`` is another family for comparison: a gated shared expert,
more experts per token, and routing weights that are not normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from vocabulary import CONTEXT


class Family(str, Enum):
    """A family of Transformers' mixture-of-experts models."""

    olmoe = "olmoe"
    qwen = "qwen"


def _common(tokenizer: PreTrainedTokenizerFast, aux: float) -> dict[str, object]:
    """Options of all families."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "num_experts": 16,
        "max_position_embeddings": 2 * CONTEXT,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": aux,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _olmoe(common: dict[str, object]) -> PreTrainedModel:
    return OlmoeForCausalLM(
        OlmoeConfig(
            hidden_size=160,
            intermediate_size=96,
            num_attention_heads=5,
            num_key_value_heads=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            initializer_range=0.06,
            **common,
        )
    )


def _qwen(common: dict[str, object]) -> PreTrainedModel:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            hidden_size=128,
            intermediate_size=128,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            decoder_sparse_step=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            initializer_range=0.07,
            **common,
        )
    )


MAKERS: dict[Family, Callable[[dict[str, object]], PreTrainedModel]] = {
    Family.olmoe: _olmoe,
    Family.qwen: _qwen,
}


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, aux: float, family: Family = Family.olmoe
) -> PreTrainedModel:
    """Initialise a model; the usual range of 0.02 is too small at these widths."""
    torch.manual_seed(seed)
    model = MAKERS[family](_common(tokenizer, aux))
    model.set_experts_implementation("grouped_mm")
    return model
