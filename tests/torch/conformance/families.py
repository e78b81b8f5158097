"""All 67 model classes of Transformers that follow its experts interface, as tiny models.

One row per class. Every config gets the ``SIZES`` that it has a field for; a row lists what else
its class needs. Sizes: E = 8 experts, K = 2, H = 32, I = 24, two MoE layers. No expert
weight is square.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "index_n_heads", "linear_num_key_heads"), 2),
    "vocab_size": 64,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 64,
    "mlp_layer_types": ["sparse", "sparse"],
    "index_topk": 4,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID = ["linear_attention", "full_attention"]
"""One attention layer at least, else the cache fails."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One class of the table."""

    model: str
    """Name of the model class."""
    module: str = ""
    """Its folder in ``transformers.models``, where it is not the family's name."""
    flags: str = "G--C--"
    """Gate, Bias, Transposed, Concatenated, post-expert Norm, own _apply_gate; ``-`` off."""
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Config fields beside ``SIZES``."""
    layers: int = 2
    """Experts modules."""
    inputs: str = "ids"
    """What a forward takes: ``ids``, ``embeds`` (no token ids), ``patches`` (a vision tower)."""
    top_k: int = 2
    checkpoints: bool = True
    """Whether Transformers can checkpoint its activations; False says that it refuses to."""
    fast: str = ""
    """What the row adds to the subset that every run of the tests takes; the others are slow."""

    def classes(self, name: str) -> tuple[type, type]:
        """Return the model class and its config class."""
        folder = self.module or name
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        model: Any = getattr(module, self.model)
        return model, model.config_class

    def is_known(self, name: str) -> bool:
        """True if the installed Transformers has the family."""
        folder = f"transformers.models.{self.module or name}"
        return importlib.util.find_spec(folder) is not None

    def config(self, name: str, **changes: Any) -> Any:
        """Return the tiny config."""
        _, config = self.classes(name)
        known = {field.name for field in dataclasses.fields(config)}
        sizes = {field: value for field, value in SIZES.items() if field in known}
        if "intermediate_size" in known:
            sizes["intermediate_size"] = 40 if "moe_intermediate_size" in known else 24
        if "kv_lora_rank" in known:
            sizes["num_key_value_heads"] = 4
        return config(**{**sizes, **self.sizes, **changes})
