"""Work in a child of this process, which has imported everything and computed nothing yet."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from scripts.kills.operations import Operations

Work = Callable[[], object]
PATIENCE = 120.0
"""Seconds after which a child hangs."""


class Kill(NamedTuple):
    """When a child is killed: so many seconds after its start, or after its n-th operation."""

    seconds: float
    operation: int | None = None


class Ended(NamedTuple):
    """How a child ended."""

    code: int
    """Its exit code; minus the number of the signal that ended it."""
    said: str
    """What it wrote to standard output and standard error."""
    operations: int
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Child:
    """A process that does some work; :meth:`end` kills it, or waits for it.

    Args:
        work: what it does; its exit code is 0 unless the work raises.
        folder: whose files it works on; operations on them are counted.
        environment: added to its own.
        at: called in the child before each operation, with its number.
        before: called in the child before the work.
    """

    def __init__(
        self,
        work: Work,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        announce: int | None = None,
        at: Callable[[int], None] | None = None,
        before: Work | None = None,
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._read, write = os.pipe()
        self._start = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        os.close(self._read)
        for stream in (1, 2):
            os.dup2(self._said.fileno(), stream)
        os.environ.update(environment or {})

        def happen(number: int) -> None:
            if number == announce:
                os.write(write, b"!")
            if at is not None:
                at(number)

        _live(work, Operations(folder, happen), write, before)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def await_operation(self, seconds: float) -> None:
        """Wait until it announces its operation, or ends, or some time is over."""
        select.select([self._read], [], [], seconds)

    def end(self, kill: Kill | None = None, number: int = signal.SIGKILL) -> Ended:
        """Wait for its end, and send it a signal before that."""
        if kill is not None:
            if kill.operation is not None:
                self.await_operation(PATIENCE)
                time.sleep(kill.seconds)
            else:
                self.await_operation(kill.seconds)
            self.send(number)
        told = _read_all(self._read, self._start + PATIENCE)
        if told is None:
            self.send(signal.SIGABRT)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._read)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        self._said.close()
        operations = int((told or b"").strip(b"!") or 0)
        return Ended(code, said, operations, time.monotonic() - self._start)


def _live(work: Work, operations: Operations, write: int, before: Work | None) -> None:
    """Do the work in the child, and end it."""
    code = 1
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    try:
        operations.install()
        if before is not None:
            before()
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(BrokenPipeError):
            os.write(write, str(operations.count).encode())
        os._exit(code)


def _read_all(pipe: int, deadline: float) -> bytes | None:
    """Read until the other end closes; None if that takes too long."""
    content = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe, 4096)
        if not part:
            return content
        content += part


def run(work: Work, folder: Path, kill: Kill | None = None) -> Ended:
    """Do some work in a child, and kill it."""
    return Child(work, folder, announce=kill.operation if kill else None).end(kill)
