"""``metrics.jsonl``: the log of a training, one JSON object per line, as it goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic_core
from transformers import TrainerCallback, TrainerState

from drlora_core import atomic
from drlora_core.runs.metrics import to_step

WRONG = ("num_tokens", "train_tokens_per_second")
"""Figures that start anew when a run goes on, and speeds with evaluations in them."""
SUMMARY, MEASURED = "train_loss", "eval_loss"
"""Only the last log of a training has the first; those of evaluations have the second."""


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a file, but for its last one.

    That has the mean loss of the steps of this process, which is not that of a run that went on.

    Args:
        path: of the file; of one that is there, rows of later steps are taken out.
        state: of the Trainer, in the checkpoint that a run goes on from; None for one that begins.
    """

    def __init__(self, path: Path, state: TrainerState | None) -> None:
        self._path = path
        self._step = 0 if state is None else state.global_step  # before it, all is logged already
        kept = "" if state is None else "".join(_lines_until(path, state))
        atomic.write_text(path, kept)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and SUMMARY not in logs and state.global_step >= self._step:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({**logs, "step": state.global_step}))


def _lines_until(path: Path, state: TrainerState) -> Iterator[str]:
    """Yield the lines of a file that were there when a checkpoint was written."""
    if not path.is_file():
        return
    last = state.global_step
    evaluated = sum(row.get("step") == last and MEASURED in row for row in state.log_history)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a crash
            continue
        if not isinstance(row, dict) or SUMMARY in row:
            continue
        at = to_step(row.get("step", 0))
        if at is None or at > last:
            continue
        if at == last and MEASURED in row:
            evaluated -= 1
            if evaluated < 0:  # at the end of the run, which comes again
                continue
        with contextlib.suppress(pydantic_core.PydanticSerializationError):
            yield _line(row)  # unless it has half a character, or is too deep


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON; numbers that are not finite become null."""
    kept = {name: value for name, value in row.items() if name not in WRONG}
    return pydantic_core.to_json(kept, inf_nan_mode="null").decode() + "\n"
