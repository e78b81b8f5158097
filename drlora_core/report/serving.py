"""Serve the report of a run that goes on, on this machine alone; the page refreshes itself."""

from __future__ import annotations

import hashlib
import html
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from drlora_core.errors import LayoutError
from drlora_core.report.page import render_run
from drlora_core.runs import Run, open_run
from drlora_core.runs.folder import METRICS, RESULT

ADDRESS = "127.0.0.1"
PAUSE = 5.0  # seconds between two looks at the run
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="refresh" content="3">
<title>drlora report</title></head>
<body style="font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 15vh auto">
<p>Waiting for the first steps of <b>{name}</b>.</p><p>{reason}</p></body></html>
"""


class LivePage:
    """The report of a run, rendered anew when the run has gone on.

    Args:
        path: the run's folder, which may have no recording yet.
        against: a run to compare with.
        pause: seconds for which a page is good without another look at the run.
    """

    def __init__(self, path: Path, against: Run | None = None, pause: float = PAUSE) -> None:
        self._path, self._against, self._pause = path, against, pause
        self._lock = threading.Lock()
        self._looked = -float("inf")
        self._version, self._page = "", ""

    def read(self) -> tuple[str, str]:
        """Return the version of the page and the page."""
        with self._lock:
            if time.monotonic() - self._looked >= self._pause:
                version = version_of(self._path)
                if version != self._version:
                    self._page, self._version = self._render(version), version
                self._looked = time.monotonic()
            return self._version, self._page

    def _render(self, version: str) -> str:
        try:
            return render_run(open_run(self._path), self._against, version=version)
        except (LayoutError, FileNotFoundError) as error:
            name, reason = html.escape(self._path.name), html.escape(str(error))
            return WAITING.format(name=name, reason=reason)


def version_of(path: Path) -> str:
    """Return a short text that changes when the files of a run do."""
    files = [*path.glob("*/*.npz"), *path.glob("*/recording.json"), *path.glob("*.npz")]
    files += [*path.glob(METRICS), *path.glob(RESULT), path]
    marks = []
    for file in sorted(files):
        try:
            status = file.stat()
        except OSError:  # replaced at this moment
            continue
        marks.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]


def make_server(live: LivePage, port: int = 0) -> ThreadingHTTPServer:
    """Make a server on this machine's own address; ``serve_forever`` starts it.

    Args:
        live: the page.
        port: to listen on; 0 takes a free one, see ``server_address``.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        """Answers ``/`` and ``/version``; other hosts' names are refused (DNS rebinding)."""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in (ADDRESS, "localhost"):
                self.send_error(403)
            elif self.path == "/":
                self._answer(live.read()[1], "text/html")
            elif self.path == "/version":
                self._answer(live.read()[0], "text/plain")
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

    return ThreadingHTTPServer((ADDRESS, port), Handler)
