"""Replaying one recording under many configurations, in parallel."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from drlora_core.comparison import compare, entropy, gini
from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, LayoutError
from drlora_core.recording.data import Recording
from drlora_core.replay import CAVEAT, Replay, replay

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """Result of `sweep`: a replay for each configuration, in the order given."""

    replays: Mapping[str, Replay]
    seconds: float

    def rows(self) -> list[Row]:
        """One dict per configuration: its ranks' spread, and its difference from the first."""
        first = next(iter(self.replays.values()))
        return [_row(name, first, result) for name, result in self.replays.items()]

    def __str__(self) -> str:
        rows = self.rows()
        cells = [list(rows[0]), *([_shown(v) for v in row.values()] for row in rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([line.rstrip() for line in lines] + [CAVEAT])


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
        configs: by a name of yours, or a sequence (then named by policy and number).
        processes: worker processes; None: one per core, but none where the work is small. Workers
            are spawned, so a script that asks for them needs an ``if __name__ == "__main__"``.
        progress: show a bar (needs rich, of the extra ``cli``).

    Raises:
        LayoutError: no configuration, or two of a name.
        DRLoRAError: as `replay`, naming the configuration.
    """
    named = _named(configs)
    if processes is None:
        work = recording.steps * len(recording.layers) * len(named)
        processes = 1 if work < 200_000 else os.cpu_count() or 1
    processes = min(processes, len(named))
    started = time.perf_counter()
    with _bar(progress, len(named)) as advance:
        run = _in_process if processes <= 1 else _in_processes
        results = run(recording, named, processes, advance)
    return Sweep({name: results[name] for name in named}, time.perf_counter() - started)


def _named(
    configs: Mapping[str, AllocatorConfig] | Sequence[AllocatorConfig],
) -> dict[str, AllocatorConfig]:
    if not isinstance(configs, Mapping):
        configs = {f"{number} {config.policy}": config for number, config in enumerate(configs, 1)}
    if not configs:
        raise LayoutError("a sweep needs at least one configuration")
    return dict(configs)


def _in_process(
    recording: Recording,
    configs: Mapping[str, AllocatorConfig],
    processes: int,
    advance: Callable[[], None],
) -> dict[str, Replay]:
    results = {}
    for name, config in configs.items():
        results[name] = _replay_named(recording, name, config)
        advance()
    return results


def _replay_named(recording: Recording, name: str, config: AllocatorConfig) -> Replay:
    try:
        return replay(recording, config)
    except DRLoRAError as error:
        raise type(error)(f"configuration {name!r}: {error}") from error


_shared: Recording | None = None  # in a worker: the recording, sent once and not with every task


def _share(recording: Recording) -> None:
    global _shared  # noqa: PLW0603
    _shared = recording


def _work(name: str, config: AllocatorConfig) -> Replay:
    assert _shared is not None
    return _replay_named(_shared, name, config)


def _in_processes(
    recording: Recording,
    configs: Mapping[str, AllocatorConfig],
    processes: int,
    advance: Callable[[], None],
) -> dict[str, Replay]:
    context = multiprocessing.get_context("spawn")  # fork is unsafe with the threads of torch
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_share, initargs=(recording,)
    )
    results = {}
    try:
        with pool:
            tasks = {pool.submit(_work, name, config): name for name, config in configs.items()}
            for task in concurrent.futures.as_completed(tasks):
                results[tasks[task]] = task.result()
                advance()
    except BrokenProcessPool as error:
        raise DRLoRAError(
            "the worker processes of the sweep ended; a script must call it below "
            'if __name__ == "__main__": (or use processes=1)'
        ) from error
    return results


@contextlib.contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[], None]]:
    if not progress:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        raise DRLoRAError('a progress bar needs rich: pip install "drlora[cli]"') from error
    from rich.console import Console

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("replaying", total=total)
        yield lambda: bar.advance(task)


def _row(name: str, first: Replay, result: Replay) -> Row:
    ranks = list(result.final_ranks.values())
    compared = compare(first, result)
    return {
        "configuration": name,
        "policy": result.policy,
        "events": len(result.events),
        "mean rank": float(np.concatenate(ranks).mean()),
        "largest": int(max(layer.max() for layer in ranks)),
        "gini": float(np.mean([gini(layer) for layer in ranks])),
        "entropy": float(np.mean([entropy(layer) for layer in ranks])),
        "unplaced": result.events[-1].unplaced if result.events else 0,
        "overlap with first": compared.mean("overlap"),
        "spearman with first": compared.mean("spearman"),
    }


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
