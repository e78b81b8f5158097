"""``drlora report --watch``: a page on this machine that follows a run."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drlora_core.report.serving import LivePage, make_server, version_of
from tests.core import recorded
from tests.core.commands import call
from tests.report.runs import write_run

pytest.importorskip("plotly")


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "run").mkdir()
    with make_server(LivePage(tmp_path / "run", pause=0.0)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_a_page_waits_for_a_run_and_then_follows_it(port: int, tmp_path: Path) -> None:
    status, text = get(port, "/")
    assert status == 200
    assert "Waiting for the first steps of <b>run</b>" in text
    before = get(port, "/version")
    recorded.record(tmp_path / "run" / "recording")
    after = get(port, "/version")
    assert before[0] == after[0] == 200
    assert before[1] != after[1]
    page = get(port, "/", host="localhost")[1]
    assert f'data-version="{after[1]}"' in page
    assert "connect-src &#39;self&#39;" in page


def test_other_paths_and_other_hosts_get_nothing(port: int) -> None:
    assert get(port, "/../run.yaml")[0] == 404
    assert get(port, "/report.html")[0] == 404
    assert get(port, "/version", host="evil.example")[0] == 403


def test_a_version_is_that_of_the_files(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    first = version_of(path)
    assert version_of(path) == first
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert version_of(path) != first


def test_a_page_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    module = "drlora_core.report.serving.render_run"
    monkeypatch.setattr(module, lambda *_, version: made.append(version) or version)
    live = LivePage(write_run(tmp_path / "run"), pause=0.0)
    assert live.read() == live.read()
    assert len(made) == 1


def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run")
    for words, message in {
        ("--watch", "--json"): "leave out --json",
        ("--watch", "--output", "x.html"): "leave out --output",
        ("--json", "--against", path): "use drlora replay",
    }.items():
        result = call(capsys, "report", path, *words)
        assert result.code == 2
        assert message in result.err
    missing = call(capsys, "report", tmp_path / "none", "--watch")
    assert "start it, then watch it" in missing.err


def test_the_server_ends_with_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", interrupt)
    result = call(capsys, "report", write_run(tmp_path / "run"), "--watch")
    assert result.code == 0
    assert result.out.startswith("http://127.0.0.1:")
    assert result.out.endswith("stopped\n")
