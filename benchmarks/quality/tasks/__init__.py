"""The tasks of the studies: generated ones, and .jsonl files.

``codes`` needs knowledge; ``strings`` and ``notation`` are skills; ``language`` is a new domain;
``mixture`` is two tasks in one. ``cipher``, ``calendar``, ``roman``, ``sorting`` and ``records``
are held out: nothing was developed or tuned on them. ``controlled_share`` and ``controlled_need``
are for the model ``controlled``, in which the relevance of each expert is known.
``python -m benchmarks.quality.tasks`` shows them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks.quality.tasks.controlled import DEMANDS, controlled
from benchmarks.quality.tasks.files import read_task
from benchmarks.quality.tasks.language import language
from benchmarks.quality.tasks.skills import calendar, cipher, notation, strings
from benchmarks.quality.tasks.task import Row, Task
from benchmarks.quality.tasks.unseen import records, roman, sorting

__all__ = ["CONTROLLED", "DEVELOPMENT", "HELD_OUT", "Row", "Task", "load_task"]


def codes() -> Task:
    """The default task of drlora: invented code books that spell digits."""
    from drlora_torch.embedded import TEST_FILE, TRAIN_FILE

    return replace(read_task(f"{TRAIN_FILE},{TEST_FILE}"), name="codes")


def mixture() -> Task:
    """``codes`` and ``strings``, alternating."""
    first, second = codes().splits, strings().splits
    halves = {
        split: tuple(
            row
            for pair in zip(first[split], second[split], strict=False)
            for row in pair  # drops the rest of the longer one
        )
        for split in first
    }
    return Task("mixture", **halves)


DEVELOPMENT: dict[str, Callable[[], Task]] = {
    "codes": codes,
    "strings": strings,
    "notation": notation,
    "language": language,
    "mixture": mixture,
}
HELD_OUT: dict[str, Callable[[], Task]] = {
    "cipher": cipher,
    "calendar": calendar,
    "roman": roman,
    "sorting": sorting,
    "records": records,
}
CONTROLLED: dict[str, Callable[[], Task]] = {name: partial(controlled, name) for name in DEMANDS}


def load_task(name_or_path: str) -> Task:
    """Return a task by name, or read it from ``rows.jsonl`` or ``train.jsonl,test.jsonl``.

    Deterministic; does not use the global random state.

    Raises:
        ValueError: no such task, or invalid rows.
    """
    makers = DEVELOPMENT | HELD_OUT | CONTROLLED
    if name_or_path in makers:
        return makers[name_or_path]()
    if name_or_path.endswith(".jsonl"):
        return read_task(name_or_path)
    raise ValueError(
        f"there is no task {name_or_path!r}; accepted: {', '.join(makers)}, or a .jsonl file"
    )
