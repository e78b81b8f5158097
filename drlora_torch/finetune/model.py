"""Load the model and tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from drlora_torch.errors import ModelError
from drlora_torch.finetune.options import is_local
from drlora_torch.finetune.sharding import Sharding
from drlora_torch.models.sharding import is_sharded


def load_model(name: str, dtype: str = "auto", sharding: Sharding | None = None) -> nn.Module:
    """Load a causal language model from a folder or by its id on the Hugging Face Hub.

    The dtype ``auto`` is float32 on a CPU, where half precision is slow, and that of the
    checkpoint on a GPU. A model that cannot be loaded, or not in shards, is a ModelError.
    """
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    if sharding is None or not sharding.is_sharded:
        whole: nn.Module = _load(AutoModelForCausalLM, name, dtype=dtype)
        return whole
    config = sharding.distributed_config()
    model: nn.Module = _load(AutoModelForCausalLM, name, dtype=dtype, distributed_config=config)
    if not is_sharded(model):
        raise ModelError(
            f"Transformers does not shard {type(model).__name__} with {' '.join(sharding.words)}; "
            "use --fsdp-size alone, or none of these options"
        )
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model."""
    return _load(AutoTokenizer, name)


def _load(loader: Any, name: str, **arguments: Any) -> Any:
    source = str(Path(name).expanduser()) if is_local(name) else name
    if is_local(name) and not Path(source, "config.json").is_file():
        raise ModelError(f"{name!r} is not the folder of a model: it has no config.json")
    try:
        return loader.from_pretrained(source, **arguments)
    except Exception as error:  # the hub client, safetensors and configurations have their own
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model {name!r} could not be loaded: {reason}") from error
