"""Errors of the PyTorch side, in the same tree as those of the core."""

from __future__ import annotations

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
