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
    assert get(port, "/?print=1")[0] == 200


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


def test_versions_are_those_of_everything_on_the_page(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    seen = {version_of(one, other)}
    files = [one / "uniform" / "metrics.jsonl", one / "run.yaml", other / "result.json"]
    for file in [*files, other / "metrics.jsonl"]:
        file.write_text(file.read_text() + "\n")
        seen.add(version_of(one, other))
    assert len(seen) == 5


def test_what_cannot_be_shown_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run")
    header = (path / "recording" / "recording.json").read_bytes()
    (path / "recording" / "recording.json").write_bytes(b"<nonsense>")
    live = LivePage(path, pause=0.0)
    version, page = live.read()
    assert version == ""
    assert "<b>run</b> cannot be shown" in page
    assert "Waiting" not in page
    (path / "recording" / "recording.json").write_bytes(header)
    assert live.read()[0] != ""

    def fail(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("<here>")

    monkeypatch.setattr("drlora_core.report.serving.render_run", fail)
    assert "internal error: ZeroDivisionError: &lt;here&gt;" in LivePage(path).read()[1]


def test_a_run_is_compared_with_one_that_comes_later(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    live = LivePage(write_run(tmp_path / "run"), other, pause=0.0)
    assert "other holds no recording" in live.read()[1]
    write_run(other)
    assert "With <bdi>other</bdi>" in live.read()[1]


def test_a_taken_port_and_a_damaged_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], port: int
) -> None:
    path = write_run(tmp_path / "whole")
    taken = call(capsys, "report", path, "--watch", "--port", str(port))
    assert taken.code == 2
    assert f"port {port} cannot be used (Address already in use); choose another" in taken.err
    (path / "recording" / "recording.json").write_text("[]")
    damaged = call(capsys, "report", path, "--watch")
    assert damaged.code == 2
    assert "recording" in damaged.err


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
