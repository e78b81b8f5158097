"""Names of modules in an adapter directory."""

from __future__ import annotations

PREFIX = "base_model.model."
"""PEFT puts it before every name of a tensor."""


def own_name(name: str) -> str:
    """Name of a module in the model itself, where that is already inside a PeftModel."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def joined(*parts: str) -> str:
    """Dotted name of parts, of which some may be empty.

    Example:
        >>> joined("mlp", "", "w1")
        'mlp.w1'
    """
    return ".".join(part for part in parts if part)
