"""Tiny models of every convention beside the interface, and where each keeps its weights.

E = 8 experts, H = 32, I = 24: no expert weight is square. ``locate`` is written here from the
models' own code, not taken from the adapters under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.torch import models
from tests.torch.models import EXPERTS, HIDDEN, INNER, SIZES

Located = tuple[nn.Parameter, Callable[[Tensor], Tensor]]
"""A parameter of the model, and the part of it (or of its gradient) that is one expert's [O, I]."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table."""

    make: Callable[[], nn.Module]
    convention: str
    locate: Callable[[Any, str, int], Located]
    told: str
    """The module beside or in the layer that tells the routing, by its name there."""
    dense: Callable[[Any, Any], Tensor]
    """What it takes and returns -> the weight of every token and expert, [T, N]."""
    layers: int = 2
    projections: dict[str, tuple[int, int]]
    encoder_decoder: bool = False
    rounding: float = 1e-9
    """Relative; of models in float64, some of which compute parts in float32."""


def _step3p7() -> nn.Module:
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


def _longcat_flash() -> nn.Module:
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


def _dbrx() -> nn.Module:
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


def _llama4() -> nn.Module:
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


def _jetmoe() -> nn.Module:
    config = transformers.JetMoeConfig(
        **{**SIZES, "num_key_value_heads": 2},
        kv_channels=8,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        activation_function="silu",
    )
    return transformers.JetMoeForCausalLM(config)


def _switch_transformers() -> nn.Module:
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


def _nllb_moe() -> nn.Module:
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


def _fused(module: Any, projection: str, expert: int) -> Located:
    return getattr(module, projection), lambda weight: weight[expert]


def _rows(module: Any, projection: str, expert: int) -> Located:
    rows = slice(expert * INNER, (expert + 1) * INNER)
    parameter = getattr(module.mlp, projection)
    return parameter, lambda w: w[rows].T if projection == "w2" else w[rows]


def _transposed(module: Any, projection: str, expert: int) -> Located:
    return getattr(module.experts, projection), lambda weight: weight[expert].T


def _child(module: Any, projection: str, expert: int) -> Located:
    return getattr(module, projection).weight, lambda weight: weight[expert]


def _linear(module: Any, projection: str, expert: int) -> Located:
    return getattr(module.experts[f"expert_{expert}"], projection).weight, lambda weight: weight


def _scattered(args: Any, output: Any) -> Tensor:
    """Routing as arguments (hidden, index, weights) of the experts; indices may repeat."""
    _, index, weights = args
    dense = torch.zeros(index.shape[0], 2 * EXPERTS, dtype=torch.float64)
    return dense.scatter_add(1, index, weights.double())[:, :EXPERTS]


def _scores(args: Any, output: Any) -> Tensor:
    scores: Tensor = output[0]
    return scores


def _gates(args: Any, output: Any) -> Tensor:
    """JetMoE's router: softmax over the largest two logits, scattered back."""
    logits: Tensor = output[4]
    kept = logits.masked_fill(logits < logits.topk(2, dim=1).values[:, -1:], float("-inf"))
    return kept.softmax(dim=1)


def _probabilities(args: Any, output: Any) -> Tensor:
    """Switch's router: one-hot times probability."""
    weights: Tensor = output[0] * output[1]
    return weights.reshape(-1, EXPERTS)


def _by_mask(args: Any, output: Any) -> Tensor:
    """NLLB's experts: the mask's ones go to expert 1, its zeros to expert 0."""
    _, mask, gates = args
    dense = torch.zeros(mask.shape[0], EXPERTS, dtype=torch.float64)
    dense[:, 1] = (gates * mask).sum(dim=1)
    dense[:, 0] = (gates * (1 - mask)).sum(dim=1)
    return dense


GATED = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
FAMILIES: dict[str, Family] = {
    "step3p7": Family(
        rounding=1e-5,
        make=_step3p7,
        convention="undecorated",
        told="",
        dense=_scattered,
        locate=_fused,
        projections=GATED,
    ),
    "longcat_flash": Family(
        rounding=1e-4,
        make=_longcat_flash,
        convention="identity experts",
        told="",
        dense=_scattered,
        locate=_fused,
        projections=GATED,
    ),
    "dbrx": Family(
        make=_dbrx,
        convention="stacked",
        told="",
        dense=_scattered,
        locate=_rows,
        projections={"w1": (HIDDEN, INNER), "v1": (HIDDEN, INNER), "w2": (INNER, HIDDEN)},
    ),
    "llama4": Family(
        make=_llama4,
        convention="weighted inputs",
        told="router",
        dense=_scores,
        locate=_transposed,
        projections=GATED,
    ),
    "jetmoe": Family(
        make=_jetmoe,
        convention="single projections",
        told="router",
        dense=_gates,
        locate=_child,
        projections={"input_linear": (HIDDEN, 2 * INNER), "output_linear": (INNER, HIDDEN)},
    ),
    "switch_transformers": Family(
        make=_switch_transformers,
        convention="per-expert Linears",
        told="router",
        dense=_probabilities,
        locate=_linear,
        projections={"wi": (HIDDEN, INNER), "wo": (INNER, HIDDEN)},
        encoder_decoder=True,
    ),
    "nllb_moe": Family(
        make=_nllb_moe,
        convention="per-expert Linears",
        told="experts",
        dense=_by_mask,
        locate=_linear,
        projections={"fc1": (HIDDEN, INNER), "fc2": (INNER, HIDDEN)},
        encoder_decoder=True,
    ),
}


def build(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """Build a model with random weights, in training mode; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        model = FAMILIES[family].make()
    models.redraw(model)
    for module in model.modules():
        if type(module).__name__ in ("SwitchTransformersTop1Router", "NllbMoeTop2Router"):
            module.dtype = dtype  # their configs know only dtypes up to float32
    return model.to(dtype).train()


def batch(family: str, seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Draw the inputs of a forward with a loss."""
    ids = models.tokens(rows, length, seed)
    return {"input_ids": ids, "labels": ids.clone()}
