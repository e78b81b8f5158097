"""``metrics.jsonl``: the log of a training, one JSON object per line, as it goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic_core
from transformers import TrainerCallback

from drlora_core import atomic
from drlora_core.runs.metrics import to_step

WRONG = ("num_tokens", "train_tokens_per_second")
"""Figures that start anew when a run goes on, and speeds with evaluations in them."""


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a file.

    Args:
        path: of the file; of one that is there, rows of later steps are taken out.
        step: of the checkpoint that a run goes on from; None for a run that begins.
    """

    def __init__(self, path: Path, step: int | None) -> None:
        self._path = path
        self._resumed = step is not None  # until the training goes on: logged already
        kept = "" if step is None else "".join(_lines_until(path, step))
        atomic.write_text(path, kept)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resumed = False

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and not self._resumed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({**logs, "step": state.global_step}))


def _lines_until(path: Path, step: int) -> Iterator[str]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a crash
            continue
        if not isinstance(row, dict) or "train_loss" in row:
            continue
        if (at := to_step(row.get("step", 0))) is not None and at <= step:
            with contextlib.suppress(
                pydantic_core.PydanticSerializationError
            ):  # half a character, or too deep
                yield _line(row)


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON; numbers that are not finite become null."""
    kept = {name: value for name, value in row.items() if name not in WRONG}
    return pydantic_core.to_json(kept, inf_nan_mode="null").decode() + "\n"
