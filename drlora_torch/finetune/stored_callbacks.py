"""Callbacks in a checkpoint of a Trainer, which makes them anew from ``trainer_state.json``.

It passes what stands there to their constructors and sets any attribute, of any kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.trainer_callback import ExportableState

from drlora_core.errors import shorten
from drlora_torch.errors import CheckpointError


def check(stored: Any, callbacks: Iterable[Any]) -> None:
    """Refuse stored callbacks with other fields, or other kinds in them, than the callbacks have.

    Args:
        stored: by the name of the class, the ``args`` and ``attributes`` of one, or a list of them.
        callbacks: those of the Trainer.

    Raises:
        CheckpointError: names the callback, the field and what is accepted.

    Example:
        >>> from transformers import EarlyStoppingCallback
        >>> wrong = {"EarlyStoppingCallback": {"args": {"early_stopping_patience": "2"}}}
        >>> check(wrong, [EarlyStoppingCallback(1)])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        drlora_torch.errors.CheckpointError: ...args.early_stopping_patience is '2'; accepted: int
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, ExportableState) and name in stored:
            given = stored[name]
            for one in given if isinstance(given, list) else [given]:
                _check_parts(name, one, callback.state())


def _check_parts(name: str, given: Any, own: dict[str, dict[str, Any]]) -> None:
    _check_fields(name, given, own)
    for part, fields in given.items():
        _check_fields(f"{name}.{part}", fields, own[part])
        for field, value in fields.items():
            kind = type(own[part][field])
            if type(value) not in (kind, int if kind is float else kind):
                raise CheckpointError(
                    f"{name}.{part}.{field} is {shorten(value)}; accepted: {kind.__name__}"
                )


def _check_fields(name: str, given: Any, own: dict[str, Any]) -> None:
    if not isinstance(given, dict) or not given.keys() <= own.keys():
        known = ", ".join(own) or "no fields"
        raise CheckpointError(
            f"{name} is {shorten(given)}; accepted: an object with {known}. Was the checkpoint "
            "written by another version of Transformers?"
        )
