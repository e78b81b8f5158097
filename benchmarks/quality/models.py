"""The models of a study: a shipped model, a local folder, or a Hugging Face id."""

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
"""Small models that were pretrained for this project; the README in each folder is its card. They
share the tokenizer of the embedded model, which is stored in its folder only."""


def load_model(
    name_or_path: str, device: str = "cpu", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; add a padding token if there is none.

    Args:
        name_or_path: a name of ``SHIPPED``, a folder, or a hub id such as
            ``allenai/OLMoE-1B-7B-0924``.
        device: of the model, e.g. ``cuda``.
        dtype: of the weights, the name of a floating-point dtype of torch.

    Raises:
        ValueError: torch has no such floating-point dtype.
        OSError: no such folder, and no such model on the hub.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype must be a floating type such as float32 or bfloat16, got {dtype}")
    source = str(SHIPPED.get(name_or_path, name_or_path))
    shipped = name_or_path in SHIPPED
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR if shipped else source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    return model.to(device), tokenizer
