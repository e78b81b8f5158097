"""The recipes for known models: valid, of families that drlora knows, and of the size they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from drlora_core.memory_forecast import RunOptions
from drlora_core.plan import make_plan
from drlora_torch.finetune.recipe import combine
from drlora_torch.models.shapes import read_shape

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
# What the models' own config.json say.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "allenai/OLMoE-1B-7B-0924": (
        "OlmoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
        },
    ),
    "Qwen/Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "openai/gpt-oss-20b": (
        "GptOssConfig",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "vocab_size": 201088,
        },
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        "DeepseekV2Config",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
    ),
}


def test_there_is_one_for_each_model() -> None:
    assert len(FILES) == len(CONFIGS) == len({combine({}, path).model for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_fits_the_gpu_that_it_names(path: Path, tmp_path: Path) -> None:
    recipe, text = combine({}, path), path.read_text(encoding="utf-8")
    allocator = recipe.options.resolved(None).allocator_config()
    assert recipe.data == "my.jsonl"
    assert "not run by us on a gpu" in text.lower()
    kind, sizes = CONFIGS[recipe.model]
    getattr(transformers, kind)(**sizes).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    packed = "nf4" if recipe.load_in_4bit else recipe.quantization
    tokens = recipe.batch_size * recipe.max_length
    plan = make_plan(shape, allocator, RunOptions(quantization=packed, tokens=tokens))
    gpu, forecast = map(int, re.findall(r"GPU of (\d+) GB: drlora plan forecasts (\d+)", text)[0])
    assert plan.memory.total is not None
    assert round(plan.memory.total / 2**30) == forecast
    assert plan.memory.total < 0.85 * gpu * 1e9  # libraries and fragments need room too


def test_the_recipe_of_olmoe_has_the_ranks_of_the_paper() -> None:
    recipe = combine({}, FOLDER / "olmoe-1b-7b.yaml")
    assert (recipe.r_init, recipe.r_target, recipe.r_max) == (8, 16, 32)
