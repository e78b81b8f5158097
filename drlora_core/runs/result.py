"""What a finished training reached, as its ``result.json`` has it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class Outcome(BaseModel):
    """Numbers of one finished training; drlora_torch writes more of them."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    method: str
    """Name of the policy."""
    loss_before: float
    """Held-out loss of the base model."""
    loss_after: float
    """Held-out loss after the training, likewise."""
    tokens_per_second: float | None = None
    seconds: float | None = None
    """Duration of the training alone."""
    peak_memory_mb: float | None = None
    """In MiB."""
    skipped_steps: int | None = None
    """Optimizer steps whose statistics were not finite; None: not known."""
    ranks: dict[str, list[int]] | None = None
    """Ranks of the saved adapter by layer; None: not known."""


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """Read a ``result.json``; without the file, or in another form, there is no outcome."""
    try:
        content = path.read_bytes()
        return tuple(TypeAdapter(list[Outcome]).validate_json(content))
    except (OSError, ValidationError):
        return ()
