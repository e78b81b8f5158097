"""Tell optimizers by name, so that their libraries are never imported for it."""

from __future__ import annotations

import functools

from torch.optim import Optimizer

BITSANDBYTES = "bitsandbytes.Optimizer8bit"
"""Base class of all optimizers of bitsandbytes, those with 32-bit state included."""
TORCHAO = "torchao._AdamBase"
"""Base class of all optimizers of torchao."""


TESTED_PACKAGES = frozenset(
    {"torch", "torchao", "bitsandbytes", "transformers", "schedulefree", "lion_pytorch"}
)
"""All their optimizers leave rows alone that are zero, with zero gradients and fresh state."""


def class_names(cls: type) -> tuple[str, ...]:
    """``{top package}.{class}`` of a class and its bases, the class itself first.

    Example:
        >>> from torch.optim import AdamW
        >>> class_names(AdamW)[:2]
        ('torch.AdamW', 'torch.Adam')
    """
    return _class_names(cls)


@functools.lru_cache(maxsize=64)
def _class_names(cls: type) -> tuple[str, ...]:
    return tuple(f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in cls.__mro__)


def full_name(cls: type) -> str:
    """``{module}.{qualified name}`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_tested(optimizer: Optimizer) -> bool:
    """True if the class itself, not only one that it derives from, is of a tested package."""
    return class_names(type(optimizer))[0].partition(".")[0] in TESTED_PACKAGES


def is_a(optimizer: Optimizer, name: str) -> bool:
    """Like ``isinstance``, by ``{top package}.{class}``."""
    return name in class_names(type(optimizer))


def algorithm(optimizer: Optimizer) -> str:
    """Name of what an optimizer of bitsandbytes computes: ``adam``, ``lion`` ...; else empty."""
    if not is_a(optimizer, BITSANDBYTES):
        return ""
    return str(getattr(optimizer, "optimizer_name", ""))
