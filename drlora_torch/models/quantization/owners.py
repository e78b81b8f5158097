"""Quantizers of Transformers as a model has them: ours, and those of other libraries."""

from __future__ import annotations

from typing import Any

from torch import nn

OURS = "drlora_"
"""How the names of our methods begin."""


def is_own(model: nn.Module) -> bool:
    """True if the experts of a model were packed, or read packed, by drlora."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer is not None and _method(quantizer).startswith(OURS)


def foreign_method(model: nn.Module) -> str | None:
    """Name of the method by which something else has quantized parts of a model."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return None if quantizer is None or is_own(model) else _method(quantizer)


def _method(quantizer: Any) -> str:
    method = quantizer.quantization_config.quant_method
    own: Any = getattr(quantizer, "stored_config", None)  # an FP8 checkpoint read by us
    method = method if own is None else own.quant_method
    return str(getattr(method, "value", method))
