"""Run the tests against each mutant, in a fork of the process that has collected them."""

from __future__ import annotations

import itertools
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state

from scripts.mutants.generate import SEPARATOR

KILLED, SURVIVED, TIMED_OUT, UNTESTED = "killed", "survived", "timed out", "untested"


class Trials:
    """A plugin of pytest: instead of running the tests once, run them for every mutant.

    A first run without a mutant tells which tests call which functions, and how long they take.
    """

    def __init__(
        self, names: Iterable[str], report: Callable[[str, str], None], seconds: float
    ) -> None:
        self.names = list(names)
        self.report = report  # is told the name of each mutant, and its end
        self.budget = seconds
        self.failed = ""  # test that fails without a mutant
        self.seconds: dict[str, float] = {}
        self.callers: defaultdict[str, list[pytest.Item]] = defaultdict(list)
        self.killers: defaultdict[str, list[pytest.Item]] = defaultdict(list)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the place of pytest's own loop."""
        set_mutant_under_test("stats")
        for item in session.items:
            start = time.process_time()
            state()._stats.clear()
            if not _passes(item):
                self.failed = item.nodeid
                return True
            self.seconds[item.nodeid] = time.process_time() - start
            for function in state()._stats:
                self.callers[function].append(item)
        for name in self.names:
            self.report(name, self._try(name))
        return True

    def _try(self, name: str) -> str:
        function = name.partition(SEPARATOR)[0]
        items = sorted(self.callers[function], key=lambda item: self.seconds[item.nodeid])
        if not items:
            return UNTESTED
        killers = self.killers[function]  # what killed another mutant of it is likely to kill
        items = [*killers, *(item for item in items if item not in killers)]
        total = itertools.accumulate(self.seconds[item.nodeid] for item in items)
        items = [item for item, so_far in zip(items, total, strict=True) if so_far < self.budget]
        number, status = _in_fork(lambda: _first_failure(name, items), self._limit(items))
        if status == KILLED and number < len(items):
            killer = items[number]
            self.killers[function] = [killer, *(each for each in killers if each is not killer)]
        return status

    def _limit(self, items: Iterable[pytest.Item]) -> int:
        return 5 + math.ceil(10 * sum(self.seconds[item.nodeid] for item in items))


def _passes(item: pytest.Item) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def _first_failure(name: str, items: list[pytest.Item]) -> int | None:
    set_mutant_under_test(name)
    return next((number for number, item in enumerate(items) if not _passes(item)), None)


def _in_fork(find: Callable[[], int | None], limit: int) -> tuple[int, str]:
    """Run in a fork with a limit of CPU seconds; return the number found, and how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        try:
            found = find()
            os.write(writing, b"" if found is None else str(found).encode())
            os._exit(0 if found is None else 1)
        except BaseException:
            os._exit(3)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return 0, TIMED_OUT
    return int(text or 2**31), KILLED if os.WEXITSTATUS(status) else SURVIVED
