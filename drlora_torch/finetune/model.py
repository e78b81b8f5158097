"""Load the model and tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from drlora_torch.errors import ModelError
from drlora_torch.finetune.options import is_local


def load_model(name: str, dtype: str = "auto") -> nn.Module:
    """Load a causal language model from a folder or by its id on the Hugging Face Hub.

    The dtype ``auto`` is float32 on a CPU, where half precision is slow, and that of the
    checkpoint on a GPU. A model that cannot be loaded is a ModelError.
    """
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    model: nn.Module = _load(AutoModelForCausalLM, name, dtype=dtype)
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
