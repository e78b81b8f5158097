"""Models, data and finished runs on disk, which all work starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def make(place: Path) -> None:
    """Write every model and the data."""
    import transformers as hf

    olmoe = hf.OlmoeConfig(**SIZES, num_experts=8, intermediate_size=24)
    qwen = hf.Qwen2MoeConfig(
        **SIZES, num_experts=8, intermediate_size=40, moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
    )  # fmt: skip
    jetmoe = hf.JetMoeConfig(
        **{**SIZES, "num_key_value_heads": 1, "num_attention_heads": 2}, num_local_experts=4,
        kv_channels=16, intermediate_size=24,
    )  # fmt: skip
    _write(place / "olmoe", hf.OlmoeForCausalLM, olmoe)
    _write(place / "qwen2_moe", hf.Qwen2MoeForCausalLM, qwen)
    _write(place / "jetmoe", hf.JetMoeForCausalLM, jetmoe)
    numbers = [(a, b) for a in range(10) for b in range(10)]
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in numbers]
    pairs = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "0"} for a, b in numbers]
    for name, rows in (("sums", sums), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)


def _write(folder: Path, kind: Any, config: Any) -> None:
    import torch

    torch.manual_seed(0)
    _tokenizer().save_pretrained(folder)
    kind(config).save_pretrained(folder)


def _tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def finish(world: Path, name: str, words: list[str]) -> None:
    """Train a run to its end."""
    from drlora_core.cli import main

    data = [str(world / "olmoe"), str(world / "sums.jsonl"), f"--output={world / name}"]
    main(["finetune", *data, "--steps=4", "--r-target=2", "--r-max=6", *words])
