"""``metrics.jsonl``: the log of a training, one JSON object per line, as it goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic_core
from transformers import TrainerCallback

from drlora_core import atomic


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a file.

    Args:
        path: of the file, which is made anew.
        rows: logs that it begins with: those until the checkpoint that a run goes on from.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._path = path
        self.resumed = False
        """True until the training goes on: what is logged before was logged already."""
        atomic.write_text(path, "".join(map(_line, rows)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resumed = False

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and not self.resumed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({**logs, "step": state.global_step}))


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON; numbers that are not finite become null."""
    return pydantic_core.to_json(dict(row), inf_nan_mode="null").decode() + "\n"
