"""A cache of the Hugging Face Hub that holds small models under the names of large ones.

Transformers and drlora find and load them as they do what was downloaded: nothing of theirs is
replaced but the place of the cache. Widths are such that experts fill blocks of 64 values (NF4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.finetune.conftest import make_tokenizer
from tests.torch import models
from tests.torch.quantized import checkpoints

COMMIT = "0" * 40
OLMOE, QWEN, GPT_OSS = "allenai/OLMoE-1B-7B-0924", "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"
SIZES: dict[str, Any] = {"hidden_size": 64, "max_position_embeddings": 4096}


def place(cache: Path, name: str) -> Path:
    """The folder of a model in the cache, which the Hub's library calls a snapshot."""
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def write(cache: Path) -> None:
    """Write a model of each family with its tokenizer."""
    tokenizer = make_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name in (OLMOE, QWEN, GPT_OSS):
        tokenizer.save_pretrained(place(cache, name))
        newest = place(cache, name).parents[1] / "refs" / "main"
        newest.parent.mkdir()
        newest.write_text(COMMIT)
    models.build("olmoe", intermediate_size=32, **SIZES, **ids).save_pretrained(place(cache, OLMOE))
    qwen = models.build("qwen3_moe", moe_intermediate_size=32, **SIZES, **ids)
    qwen.save_pretrained(place(cache, QWEN))
    checkpoints.write_mxfp4(place(cache, GPT_OSS), **ids)


def use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, and those that it starts, read this cache and nothing else."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
