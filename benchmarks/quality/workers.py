"""Execute runs in this process or in worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from benchmarks.quality.errors import StudyError
from benchmarks.quality.records import RunRecord, RunSpec

Execute = Callable[[RunSpec], RunRecord]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A run that raised."""

    spec: RunSpec
    reason: str


Outcomes = Iterator[RunRecord | Failure]
Pool = Callable[[Sequence[RunSpec]], Outcomes]
"""Executes runs and yields their outcomes as they finish."""


@contextlib.contextmanager
def pool(workers: int, execute: Execute | None = None) -> Iterator[Pool]:
    """Start worker processes; leaving the context ends them.

    Args:
        workers: number of processes, which share the cores; 1 is this process.
        execute: executes a run in this process; default: training.
    """
    if workers == 1:
        _quiet()
        chosen = execute or _train
        yield lambda specs: (attempt(spec, chosen) for spec in specs)
        return
    threads = max((os.cpu_count() or 1) // workers, 1)
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _prepare, (threads,)
    )
    try:
        yield lambda specs: _spread(executor, specs)
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    executor.shutdown()


def attempt(spec: RunSpec, execute: Execute) -> RunRecord | Failure:
    """Execute a run; turn an error into a ``Failure``."""
    try:
        return execute(spec)
    except Exception as error:  # the study continues
        return Failure(spec, f"{type(error).__name__}: {error}")


def _spread(executor: ProcessPoolExecutor, specs: Sequence[RunSpec]) -> Outcomes:
    futures = [executor.submit(attempt, spec, _train) for spec in specs]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise StudyError(
            "a worker process died, perhaps for lack of memory; finished runs are kept, run the "
            "same command again (with fewer --workers)"
        ) from None


def _prepare(threads: int) -> None:
    """Initialise a worker: limit its threads, and leave Ctrl-C to the parent."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _quiet()


def _quiet() -> None:
    """Disable the progress bars of Transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _train(spec: RunSpec) -> RunRecord:
    from benchmarks.quality.training import run  # load torch in workers only

    return run(spec)
