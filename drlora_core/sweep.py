"""Replay one recording under many configurations, in several processes where it pays."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from drlora_core.comparison import compare
from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, LayoutError, import_extra
from drlora_core.recording import Recording
from drlora_core.replay import CAVEAT, Replay, replay

SMALL = 200_000  # samples (steps x layers x configurations) below which one process is faster


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """Result of `sweep`: a replay for each configuration, in the order given."""

    replays: Mapping[str, Replay]
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per configuration: spread of its ranks, overlap with the first."""
        first = next(iter(self.replays.values()))
        return [_describe(name, first, result) for name, result in self.replays.items()]

    def __str__(self) -> str:
        rows = self.rows()
        cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
        lines = [[name.replace("_", " ") for name in rows[0]], *cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*text, CAVEAT])


def sweep(
    recording: Recording,
    configs: Mapping[str, AllocatorConfig] | Sequence[AllocatorConfig],
    processes: int | None = None,
    *,
    progress: bool = False,
) -> Sweep:
    """Replay a recording under every configuration.

    A replay cannot know how the statistics would have changed under other ranks: compare decisions
    here, and outcomes by training.

    Args:
        recording: the statistics.
        configs: by a name of yours, or a sequence (then named by number and policy).
        processes: worker processes; None: one per core, or none if the work is small. A script
            that uses workers must call this below ``if __name__ == "__main__":``.
        progress: show a bar (needs rich, of the extra ``cli``).

    Raises:
        LayoutError: no configuration is given.
        DRLoRAError: as `replay`, naming the configuration.
    """
    if not isinstance(configs, Mapping):
        configs = {f"{number} {config.policy}": config for number, config in enumerate(configs, 1)}
    if not configs:
        raise LayoutError("a sweep needs at least one configuration")
    if processes is None:
        small = recording.steps * len(recording.layers) * len(configs) < SMALL
        processes = 1 if small else os.cpu_count() or 1
    started = time.perf_counter()
    results = _run(recording, configs, min(processes, len(configs)))
    if progress:
        console = import_extra("rich.console", "cli").Console(stderr=True)
        track = import_extra("rich.progress", "cli").track
        results = track(results, "replaying", total=len(configs), console=console)
    replays = dict(results)
    return Sweep({name: replays[name] for name in configs}, time.perf_counter() - started)


def _run(
    recording: Recording, configs: Mapping[str, AllocatorConfig], processes: int
) -> Iterator[tuple[str, Replay]]:
    """Replay each configuration, as they finish; in this process if it is to be one."""
    if processes <= 1:
        yield from ((name, _replay_named(recording, name, configs[name])) for name in configs)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe with the threads of torch
    try:
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            tasks = {
                pool.submit(_replay_apart, recording, name, config): name
                for name, config in configs.items()
            }
            for task in concurrent.futures.as_completed(tasks):
                yield tasks[task], Replay(recording=recording, **task.result())
    except BrokenProcessPool as error:
        raise DRLoRAError(
            "the worker processes of the sweep ended; a script must call it below "
            'if __name__ == "__main__": (or use processes=1)'
        ) from error


def _replay_named(recording: Recording, name: str, config: AllocatorConfig) -> Replay:
    try:
        return replay(recording, config)
    except DRLoRAError as error:
        raise type(error)(f"configuration {name!r}: {error}") from error


def _replay_apart(recording: Recording, name: str, config: AllocatorConfig) -> dict[str, Any]:
    """Return a replay's fields without the recording, which need not travel back."""
    fields = vars(_replay_named(recording, name, config))
    return {field: value for field, value in fields.items() if field != "recording"}


def _describe(name: str, first: Replay, result: Replay) -> dict[str, Any]:
    ranks = np.concatenate(list(result.final_ranks.values()))
    compared = compare(first, result)
    return {
        "configuration": name,
        "policy": result.policy,
        "events": len(result.events),
        "mean_rank": float(ranks.mean()),
        "largest": int(ranks.max()),
        "gini": compared.mean("gini_b"),
        "entropy": compared.mean("entropy_b"),
        "unplaced": result.events[-1].unplaced if result.events else 0,
        "overlap_with_first": compared.mean("overlap"),
        "spearman_with_first": compared.mean("spearman"),
    }
