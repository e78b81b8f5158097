"""Errors of the PyTorch side, in the same tree as those of the core."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from drlora_core.errors import DRLoRAError, near_misses

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ModelError(DRLoRAError):
    """The model has no MoE layers, or ones that cannot be adapted."""


FOREIGN_CODE = (
    "it needs Python code of its own, which drlora does not run; read that code, load the model in "
    "Python with trust_remote_code=True, and use drlora_torch.attach"
)


def needs_foreign_code(error: Exception) -> bool:
    """True if Transformers refused to run the code that came with a model."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


class AttachError(DRLoRAError):
    """The adapter cannot be attached this way, or is no longer attached."""


class ArgumentError(AttachError, TypeError):
    """A function has no argument of this name."""


class CheckpointError(DRLoRAError):
    """A saved adapter is damaged, foreign, or does not fit the model."""


class NotFiniteError(CheckpointError):
    """Weights are not finite, so that nothing was saved: the training has diverged."""


class DataError(DRLoRAError):
    """Training data that is missing, empty or in no known format."""


class RunError(DRLoRAError):
    """A fine-tuning run that cannot start or be resumed where it was asked to."""


def explain_keywords(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function with many options name those closest to a misspelled one.

    Example:
        >>> @explain_keywords
        ... def attach(*, layout: str = "pooled") -> str:
        ...     return layout
        >>> attach(layuot="masked")
        Traceback (most recent call last):
        drlora_torch.errors.ArgumentError: attach() has no argument 'layuot'; did you mean 'layout'?
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for name in kwargs.keys() - known.keys():
            hint = near_misses(name, known)
            raise ArgumentError(f"{function.__name__}() has no argument {name!r}; {hint}")
        return function(*args, **kwargs)

    return call


def refuse_copy(_: object) -> NoReturn:
    """Stand in for ``__reduce__`` of what must be neither copied nor pickled with a model."""
    raise AttachError(
        "a model with an adapter can be neither copied nor pickled: both models would count in "
        "one engine; use save_pretrained and load, or detach() first"
    )
