"""Serve the report of a run that goes on, on this machine alone; the page refreshes itself."""

from __future__ import annotations

import functools
import hashlib
import html
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from drlora_core.errors import DRLoRAError
from drlora_core.report.page import render_run
from drlora_core.runs import open_run
from drlora_core.runs.folder import HEADERS, METRICS, RECIPE, RESULT

ADDRESS = "127.0.0.1"
PAUSE = 5.0  # seconds between two looks at the run
FILES = ("*/*.npz", "*/recording.json", "*.npz", METRICS, f"*/{METRICS}", RESULT, RECIPE)
NO_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="refresh" content="3">
<title>drlora report</title></head>
<body style="font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 15vh auto">
<p>{state}</p><p>{reason}</p></body></html>
"""


class LivePage:
    """The report of a run, rendered anew when the run has gone on.

    Args:
        path: the run's folder, which may have no recording yet; a recording, or a trace.
        against: a run to compare with, likewise.
        pause: seconds for which a page is good without another look at the run; as many times as
            long after a page that took more than a second to make.
    """

    def __init__(self, path: Path, against: Path | None = None, pause: float = PAUSE) -> None:
        self._path, self._against, self._pause = path, against, pause
        self._lock = threading.Lock()
        self._look_again = -float("inf")
        self._version, self._page = "", ""

    def read(self) -> tuple[str, str]:
        """Return the version of the page and the page."""
        with self._lock:
            if (start := time.monotonic()) >= self._look_again:
                version = version_of(*(path for path in (self._path, self._against) if path))
                if version != self._version:
                    self._version, self._page = self._render(version)
                end = time.monotonic()
                self._look_again = end + self._pause * max(1.0, end - start)
            return self._version, self._page

    def _render(self, version: str) -> tuple[str, str]:
        """Render the page; one that only says why there is none has no version, to be tried anew.

        A defect of ours is shown on the page too: a server has no other place to say it, and the
        next files may be good.
        """
        try:
            against = None if self._against is None else open_run(self._against)
            return version, render_run(open_run(self._path), against, version=version)
        except Exception as error:
            state, reason = "{} cannot be shown; this page tries again.", str(error)
            if is_awaited(self._path):
                state = "Waiting for the first steps of {}."
            elif not isinstance(error, (DRLoRAError, OSError)):
                reason = f"internal error: {type(error).__name__}: {error}"
            name = f"<b>{html.escape(self._path.resolve().name)}</b>"
            page = NO_PAGE.format(state=state.format(name), reason=html.escape(reason))
            return "", page.encode(errors="replace").decode()


def is_awaited(path: Path) -> bool:
    """True for a folder in which there is no recording yet."""
    places = [place for name in HEADERS for place in (name, f"*/{name}")]
    return path.is_dir() and not any(any(path.glob(place)) for place in places)


def version_of(*paths: Path) -> str:
    """Return a short text that changes when the files of runs do."""
    files = [file for path in paths for part in FILES for file in path.glob(part)]
    marks = []
    for file in sorted({*files, *paths}):
        try:
            status = file.stat()
        except OSError:  # replaced at this moment
            continue
        marks.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    content = "\n".join(marks).encode(errors="surrogateescape")
    return hashlib.sha256(content).hexdigest()[:16]


class PageHandler(BaseHTTPRequestHandler):
    """Answers ``/`` and ``/version``; other hosts' names are refused (DNS rebinding)."""

    def __init__(self, live: LivePage, *arguments: Any) -> None:
        self._live = live
        super().__init__(*arguments)  # answers the request

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        path = self.path.partition("?")[0]
        if host not in (ADDRESS, "localhost"):
            self.send_error(403)
        elif path == "/":
            self._answer(self._live.read()[1], "text/html")
        elif path == "/version":
            self._answer(self._live.read()[0], "text/plain")
        else:
            self.send_error(404)

    def _answer(self, text: str, kind: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing: the terminal is for the user."""


class PageServer(ThreadingHTTPServer):
    """A server that says nothing of browsers that left before their answer was written."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(live: LivePage, port: int = 0) -> PageServer:
    """Make a server on this machine's own address; ``serve_forever`` starts it.

    Args:
        live: the page.
        port: to listen on; 0 takes a free one, see ``server_address``.

    Raises:
        DRLoRAError: the port cannot be had.
    """
    try:
        return PageServer((ADDRESS, port), functools.partial(PageHandler, live))
    except OSError as error:
        raise DRLoRAError(
            f"port {port} cannot be used ({error.strerror}); choose another, or leave --port out "
            "for any that is free"
        ) from error
