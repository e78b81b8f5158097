"""Errors of the PyTorch side, in the same tree as those of the core."""

from __future__ import annotations

from typing import NoReturn

from drlora_core.errors import DRLoRAError


class ModelError(DRLoRAError):
    """The model has no MoE layers, or ones that cannot be adapted."""


class AttachError(DRLoRAError):
    """The adapter cannot be attached this way, or is no longer attached."""


class CheckpointError(DRLoRAError):
    """A saved adapter is damaged, foreign, or does not fit the model."""


class DataError(DRLoRAError):
    """Training data that is missing, empty or in no known format."""


class RunError(DRLoRAError):
    """A fine-tuning run that cannot start or be resumed where it was asked to."""


def refuse_copy(_: object) -> NoReturn:
    """Stand in for ``__reduce__`` of what must be neither copied nor pickled with a model."""
    raise AttachError(
        "a model with an adapter can be neither copied nor pickled: both models would count in "
        "one engine; use save_pretrained and load, or detach() first"
    )
