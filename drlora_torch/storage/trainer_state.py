"""``trainer_state.json`` of a Trainer's checkpoint: what in it is counted with has its kind.

The Trainer takes every field as it stands, so a file that was changed would end it at a later step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drlora_core.bounds import LARGEST_STEP
from drlora_core.errors import describe_validation_error
from drlora_torch.errors import CheckpointError

FILE = "trainer_state.json"
"""Last file that the Trainer writes into a checkpoint."""
Steps = Annotated[int, Field(ge=0, le=LARGEST_STEP)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]  # sys.maxsize epochs of a stream without length


class Fields(BaseModel):
    """The fields that the Trainer and drlora read, with the Trainer's own defaults."""

    model_config = ConfigDict(strict=True, frozen=True)

    epoch: Amount | None = 0.0
    global_step: Steps = 0
    max_steps: Steps = 0
    logging_steps: Amount = 500  # 0 and fractions where another strategy decides
    eval_steps: Amount = 500
    save_steps: Amount = 500
    train_batch_size: Count | None = None
    num_train_epochs: Count = 0
    num_input_tokens_seen: Count = 0
    total_flos: Amount = 0.0
    log_history: list[dict[str, Any]] = []
    best_metric: float | None = None
    best_global_step: Steps | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] | None = None


def read(checkpoint: Path) -> Fields | None:
    """Read the state of a checkpoint; None if a crash has cut it short: there is no whole JSON.

    Raises:
        CheckpointError: the file is whole, and a field is not what the Trainer writes.
    """
    try:
        content = json.loads((checkpoint / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    try:
        return Fields.model_validate(content)
    except ValidationError as error:
        reason = describe_validation_error(error)
        raise CheckpointError(f"{checkpoint / FILE} is not a Trainer's state: {reason}") from error
