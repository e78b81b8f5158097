"""The models of a study: those that ship here, a local folder, or an id of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from drlora_torch.embedded import MODEL_DIR

FOLDER = Path(__file__).parent / "models"
SHIPPED: dict[str, Path] = {
    "embedded": MODEL_DIR,
    "qwen": FOLDER / "qwen",
    "controlled": FOLDER / "controlled",
}
"""Small models pretrained for this project; the README in each folder is its card."""


def load_model(
    name_or_path: str, device: str = "cpu", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, which gets a padding token if it has none.

    Args:
        name_or_path: a name of ``SHIPPED``, a folder, or a hub id such as
            ``allenai/OLMoE-1B-7B-0924``.
        device: where the model goes, e.g. ``cuda``.
        dtype: of its weights, a floating type of torch.

    Raises:
        ValueError: torch has no such floating type.
        OSError: neither a folder nor a model on the hub.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype must be a floating type such as float32 or bfloat16, got {dtype}")
    source = str(SHIPPED.get(name_or_path, name_or_path))
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    return model.to(device), tokenizer
