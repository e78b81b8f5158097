"""A command that is told to stop says so, and leaves no temporary files."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP; Python makes SIGINT a KeyboardInterrupt
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Terminated(BaseException):
    """A signal that ends the process has come."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as shells have it


def is_ignored(number: int) -> bool:
    """True for a signal that is to do nothing, as SIGHUP under ``nohup``."""
    return signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Inside, signals that end the process raise :class:`Terminated`; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated(number)
        signal.signal(number, signal.SIG_DFL)  # a forked worker ends as it would without us
        os.kill(os.getpid(), number)

    before = {number: signal.signal(number, stop) for number in SIGNALS if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
