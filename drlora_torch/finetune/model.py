"""Load the model and tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from drlora_torch.errors import ModelError
from drlora_torch.finetune.options import FinetuneOptions, is_local


def load_model(name: str, dtype: str = "auto") -> nn.Module:
    """Load a causal language model from a folder or by its id on the Hugging Face Hub.

    ``auto`` takes the dtype of the checkpoint, but float32 on a CPU, where half precision is slow.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    chosen = dtype if dtype == "auto" else _dtype(dtype)
    model: nn.Module = _fetch(AutoModelForCausalLM, name, dtype=chosen)
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    return _fetch(AutoTokenizer, name)


def load(options: FinetuneOptions) -> tuple[nn.Module, Any]:
    """Load the model and tokenizer of a run."""
    return load_model(options.model, options.dtype), load_tokenizer(options.model)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _fetch(loader: Any, name: str, **arguments: Any) -> Any:
    if is_local(name) and not (Path(name).expanduser() / "config.json").is_file():
        raise ModelError(f"{name!r} is not the folder of a model: it has no config.json")
    source = str(Path(name).expanduser()) if is_local(name) else name
    try:
        return loader.from_pretrained(source, **arguments)
    except Exception as error:  # the hub client, safetensors and configs raise their own kinds
        reason = str(error).strip().split("\n")[0]
        where = "" if is_local(name) else " and is not a folder here"
        raise ModelError(f"model {name!r} could not be loaded{where}: {reason}") from error
