"""Do runs, in this process or in several."""

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
"""Does runs in order, and yields what comes of them as they finish."""


@contextlib.contextmanager
def pool(workers: int, execute: Execute | None = None) -> Iterator[Pool]:
    """Inside, runs are done by that many processes; leaving early ends them.

    Args:
        workers: processes, each with its share of the cores; 1 is this process.
        execute: does a run, in this process; default: training it.
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
    """Do a run; an error of it does not end the study."""
    try:
        return execute(spec)
    except Exception as error:  # the study goes on, and says at the end what failed
        return Failure(spec, f"{type(error).__name__}: {error}")


def _spread(executor: ProcessPoolExecutor, specs: Sequence[RunSpec]) -> Outcomes:
    futures = [executor.submit(attempt, spec, _train) for spec in specs]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise StudyError(
            "a worker process died, of too little memory perhaps; what is finished is kept, and "
            "the same command goes on (with fewer --workers)"
        ) from None


def _prepare(threads: int) -> None:
    """Start a worker: its share of the cores, and Ctrl-C is the parent's business."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _quiet()


def _quiet() -> None:
    """Leave the terminal to our own progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _train(spec: RunSpec) -> RunRecord:
    from benchmarks.quality.training import run  # torch is loaded where runs are done

    return run(spec)
