"""Open what a training left behind: a run's folder, a recording, or a routing trace."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from drlora_core.config import AllocatorConfig
from drlora_core.recording import Recording, load_trace
from drlora_core.runs import folder
from drlora_core.runs.metrics import Losses, read_losses
from drlora_core.runs.recipe import read_recipe
from drlora_core.runs.result import Outcome, read_outcomes
from drlora_core.runs.run import Run, from_recording

TRACE_EVENTS = 10


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run, also while it goes on.

    Args:
        path: a folder with a recording and perhaps ``metrics.jsonl``, ``result.json`` and
            ``run.yaml``, as ``drlora finetune`` writes it; a recording; or a trace (``.npz``).
            A trace and a profile have no configuration: ten events are spread over their steps.

    Raises:
        LayoutError: there is no recording, or it is damaged.
        OSError: the path cannot be read.
    """
    path = Path(path)
    whole = path.resolve()
    if whole.name == folder.RECORDING and (whole.parent / folder.RECIPE).is_file():
        path = whole.parent  # the recording of a run stands for the run
    is_trace = path.suffix == ".npz"
    recording = load_trace(path) if is_trace else Recording.open(_recording(path))
    config = None
    if recording.config is None:  # a trace has no importance either
        settings = ten_events(recording.steps) | {"use_importance": not is_trace}
        config = AllocatorConfig.model_validate(settings)
    name = path.resolve().name.encode(errors="replace").decode()  # file systems allow any bytes
    run = from_recording(recording, config, name)
    if not path.is_dir() or recording.path == path:
        return dataclasses.replace(run, path=path)
    outcomes = read_outcomes(path / folder.RESULT)
    return dataclasses.replace(
        run,
        path=path,
        losses=read_losses(path / folder.METRICS),
        outcome=outcomes[0] if outcomes else None,
        compared=_compared(path, outcomes[1:]),
        recipe=read_recipe(path / folder.RECIPE),
    )


def ten_events(steps: int) -> dict[str, int]:
    """Spread ten events over the steps, after a tenth of them."""
    interval = max(1, (steps - steps // TRACE_EVENTS) // TRACE_EVENTS)
    warmup = max(0, steps - TRACE_EVENTS * interval)
    return {"warmup_steps": warmup, "growth_interval": interval, "growth_end": steps}


def _recording(path: Path) -> Path:
    """The recording of a run; finetune's own before others that lie in the folder."""
    own = path / folder.RECORDING
    return own if (own / folder.HEADERS[0]).exists() else folder.find_recording(path)


def _compared(
    path: Path, outcomes: tuple[Outcome, ...]
) -> tuple[tuple[str, Losses, Outcome | None], ...]:
    """Return the methods that were trained in folders of the run's own, each named like it."""
    finished = {outcome.method: outcome for outcome in outcomes}
    names = sorted(child.parent.name for child in path.glob(f"*/{folder.METRICS}"))
    return tuple(
        (name, read_losses(path / name / folder.METRICS), finished.get(name)) for name in names
    )
