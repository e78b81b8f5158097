"""Tiny models of the families beside the interface: E = 8 experts, H = 32, I = 24, two layers."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

from tests.torch.models import EXPERTS, HIDDEN, INNER, SIZES


def step3p7() -> nn.Module:
    from transformers.models.step3p7 import configuration_step3p7 as configuration
    from transformers.models.step3p7 import modeling_step3p7 as modeling

    config = configuration.Step3p7TextConfig(
        **SIZES,
        n_routed_experts=EXPERTS,
        intermediate_size=40,
        moe_intermediate_size=INNER,
        share_expert_dim=28,
        head_dim=8,
        mlp_layer_types=["sparse", "sparse"],
        layer_types=["full_attention", "full_attention"],
        swiglu_limits=[0.5, 0.0],
        sliding_window=8,
    )
    return Headed(modeling.Step3p7TextModel(config))


LONGCAT_DERIVES = ("num_hidden_layers", "num_experts_per_tok", "num_key_value_heads")


def longcat_flash() -> nn.Module:
    config = transformers.LongcatFlashConfig(
        **{k: v for k, v in SIZES.items() if k not in LONGCAT_DERIVES},
        num_layers=2,
        ffn_hidden_size=40,
        expert_ffn_hidden_size=INNER,
        n_routed_experts=EXPERTS,
        zero_expert_num=4,
        moe_topk=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
    )
    return transformers.LongcatFlashForCausalLM(config)


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={
            "ffn_hidden_size": INNER,
            "hidden_size": HIDDEN,
            "moe_num_experts": EXPERTS,
            "moe_top_k": 2,
        },
        tie_word_embeddings=False,
    )
    return transformers.DbrxForCausalLM(config)


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **{**SIZES, "num_experts_per_tok": 2},
        intermediate_size=INNER,
        intermediate_size_mlp=40,
        num_local_experts=EXPERTS,
        head_dim=8,
        interleave_moe_layer_step=1,
        attention_chunk_size=8,
    )
    return transformers.Llama4ForCausalLM(config)


def jetmoe() -> nn.Module:
    config = transformers.JetMoeConfig(
        **{**SIZES, "num_key_value_heads": 2},
        kv_channels=8,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        activation_function="silu",
    )
    return transformers.JetMoeForCausalLM(config)


def switch_transformers() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=INNER,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=EXPERTS,
        expert_capacity=3,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_moe() -> nn.Module:
    config = transformers.NllbMoeConfig(
        vocab_size=64,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=EXPERTS,
        expert_capacity=64,
        moe_token_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


class Headed(nn.Module):
    """A loss over a model that has none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.lm_head = nn.Linear(HIDDEN, 64, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the model."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    @property
    def is_activation_checkpointing(self) -> bool:
        """As the model says."""
        return bool(self.model.is_activation_checkpointing)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Logits and loss, as a causal language model gives them."""
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].reshape(-1, 64)
            loss = nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)
