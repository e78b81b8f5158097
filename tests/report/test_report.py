"""The page of the report: what it says, that names stay text, and its size."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_core import LayoutError
from drlora_core.recording import Recording
from drlora_core.replay import replay
from drlora_core.report import event_rows, payload, render, render_run, write_report
from drlora_core.report.headline import headline
from drlora_core.report.verdicts import check
from drlora_core.runs import as_run, open_run
from drlora_core.runs.result import Outcome
from tests.core import recorded
from tests.report.runs import write_large, write_run

pytest.importorskip("plotly")
pytest.importorskip("jinja2")
HOSTILE = "</script><script>alert('x')</script><b onload=\"x\">%{x}"


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("report") / "run"
    recorded.record(path)
    return Recording.open(path)


class Parser(HTMLParser):
    """Notes the tags of a page, its event handlers and whatever it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        outside = [value or "" for name, value in attrs if name in ("src", "href", "action")]
        self.loaded += [value for value in outside if not value.startswith("#")]


def unpack(packed: str) -> str:
    return gzip.decompress(base64.b64decode(packed)).decode()


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="figure-data">([^<]*)<', page)
    assert found is not None
    figures: dict[str, Any] = json.loads(unpack(found.group(1)))
    return figures


def plotly_texts(values: Any) -> Iterator[str]:
    """All texts of figures that Plotly shows."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from plotly_texts(value)
    elif isinstance(values, list):
        for value in values:
            yield from plotly_texts(value)


def check_plotly_texts(page: str) -> None:
    for variants in figures_of(page).values():
        for text in plotly_texts([each["figure"] for each in variants]):
            assert "<" not in re.sub("</?(br|extra)>", "", text)


def small_page(name: str) -> str:
    """A page of a replay whose layer and title have a name."""
    routing = {name: np.random.default_rng(0).random((20, 4))}
    routing[name][:, 0] = 0.0  # a finding names the layer
    config = recorded.config(use_importance=False, scope="global", r_max=6)
    return render(Recording.from_arrays(routing), config, title=f"a & b {name}")


def test_event_rows_add_up(recording: Recording) -> None:
    rows = event_rows(replay(recording))
    assert sum(row["units_placed"] for row in rows) == 20
    assert rows[-1]["mean_rank"] == 4.0
    assert event_rows(recording) == rows


def test_hostile_names_are_text_in_html_and_in_plotly() -> None:
    page = small_page(HOSTILE)
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert "<h1><bdi>a &amp; b &lt;/script&gt;" in page
    parsed = Parser(page)
    assert parsed.tags.count("script") == 3  # the two that hold data, and the page's own
    assert parsed.handlers == []
    check_plotly_texts(page)
    assert "cannot know how they would have changed" in page


@functools.cache
def plain_tags() -> list[str]:
    return Parser(small_page("plain")).tags


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=3)
def test_no_name_leaves_its_place(name: str) -> None:
    page = small_page(name)
    assert Parser(page).tags == plain_tags()
    check_plotly_texts(page)


def test_a_page_has_everything_that_lies_in_the_folder_of_the_run(tmp_path: Path) -> None:
    page = render_run(open_run(write_run(tmp_path / "my run")))
    assert "the held-out loss fell from 3.000 to 1.000 nats per token" in page
    assert "uniform LoRA with the same budget reached 1.500" in page
    assert "The budget of 40 rank units was met exactly, in 3 events." in page
    assert "Half of the growth went to " in page
    assert "The held-out loss fell." in page
    assert "Every step had finite statistics" in page
    assert "A replay of the recording repeats the run&#39;s decisions exactly." in page
    assert "Python 3.12.0, drlora 0.1.0, torch 2.13.0" in page
    recipe = str(tmp_path / "my run" / "run.yaml")
    assert f"drlora finetune --config &#39;{recipe}&#39; --output &#39;my run-again&#39;" in page
    keys = {"loss", "map", "total", "trajectories", "signals", "histogram", "routing"}
    assert set(figures_of(page)) == keys | {"lorenz", "spread"}
    choices = [each["name"] for each in figures_of(page)["signals"]]
    assert sorted(choices) == ["first", "second"]
    assert Parser(page).loaded == []
    assert "connect-src 'none'" in html.unescape(page)
    assert len(page.encode()) < 2_000_000


def test_scripts_that_may_run_are_those_of_the_page_alone() -> None:
    page = small_page("plain")
    (found,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    policy = html.unescape(found)
    own = page.rpartition("<script>")[2].partition("</script>")[0]
    for source in (own, payload.plotly_source()):
        assert payload.script_hash(source) in policy
    assert "default-src 'none'" in policy
    (packed,) = re.findall(r'id="plotly-source">([^<]*)<', page)
    assert unpack(packed) == payload.plotly_source()


def test_what_is_shipped_of_plotly_fits_the_library() -> None:
    offline = pytest.importorskip("plotly.offline")
    head = payload.plotly_source()[:300]
    version = head.split(" v")[1].split("\n")[0]
    assert "MIT license" in head
    assert int(version.split(".")[0]) >= int(offline.get_plotlyjs_version().split(".")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "experts"), [pytest.param(26, 64, marks=pytest.mark.exhaustive), (61, 384)]
)
def test_pages_of_large_models_are_below_2_mb(layers: int, experts: int, tmp_path: Path) -> None:
    path = write_large(tmp_path / "run", layers, experts, steps=120, events=24)
    page = write_report(open_run(path), against=open_run(path))
    assert page.stat().st_size < 2_000_000


def test_two_runs_are_compared_on_a_page(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "one"))
    other = open_run(write_run(tmp_path / "two", gamma=0.0))
    page = render_run(run, other)
    assert {"difference", "overlap"} <= set(figures_of(page))
    assert re.search(r"With <bdi>two</bdi>: Both give \d+% of the rank", page)
    assert "<bdi>one (this run)</bdi>" in page
    wrong = Recording.from_arrays({"x": np.ones((4, 3))})
    with pytest.raises(LayoutError, match="has other layers"):
        render_run(run, as_run(replay(wrong, recorded.config(use_importance=False))))


def test_a_page_says_what_is_wrong(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", max_growth=1, quota=1))
    bad = Outcome(method="greedy", loss_before=1.0, loss_after=2.0, skipped_steps=3)
    page = render_run(dataclasses.replace(run, outcome=bad))
    assert "did not fall: it went from 1.000 to 2.000" in page
    assert "3 steps had statistics that were not finite" in page
    assert "rank units of the budget were never placed" in page
    assert "No problem was found" not in page


def test_a_page_says_what_differs_and_what_was_torn(recording: Recording) -> None:
    routing = recording.routing.copy()
    routing[2, 0] = 1e6
    fields = {name: getattr(recording, name) for name in vars(recording)}
    changed = Recording(**(fields | {"routing": routing, "notes": ("torn tail",)}))
    page = render(changed)
    assert "a replay of the recording differs from the run: step 8" in page
    assert '<p class="note">torn tail</p>' in page


def test_a_page_shows_the_decisions_of_an_unknown_policy(recording: Recording) -> None:
    fields = {name: getattr(recording, name) for name in vars(recording)}
    page = render(Recording(**(fields | {"policy": "Lazy"})))
    assert "The budget of 40 rank units was met exactly" in page
    assert "repeats the run" not in page


def test_growth_of_statistics_without_events_is_that_of_their_replay() -> None:
    """The page once said that nothing was placed, above a figure of eight events."""
    rng = np.random.default_rng(0)
    layers = {"a": rng.random((20, 6)), "b": rng.random((20, 6))}
    page = render(Recording.from_arrays(layers, layers, config=recorded.config()))
    assert "0% of the growth is placed" not in page
    assert "Ranks differ clearly" in page


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_without_events_has_a_page(steps: int, tmp_path: Path) -> None:
    recorded.record(tmp_path / "run" / "recording", steps=steps)
    page = render_run(open_run(tmp_path / "run"))
    assert "<p>None yet.</p>" in page
    assert "of 3 planned" in page


def test_the_recording_of_a_run_stands_for_the_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert write_report(open_run(path / "recording")) == path / "report.html"
    assert "held-out loss fell" in (path / "report.html").read_text()  # not a page without losses


def test_a_page_tells_the_steps_that_were_made(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    run = open_run(path)
    assert "In 20 steps the held-out loss fell" in headline(run)[0]  # 30 were planned
    assert check(run) == check(open_run(path / "recording"))
    outcomes = json.loads((path / "result.json").read_text())
    del outcomes[0]["skipped_steps"]  # as an older file
    (path / "result.json").write_text(json.dumps(outcomes))
    assert any("none was skipped" in each for each in check(run).good)
    assert not any("none was skipped" in each for each in check(open_run(path)).good)


def test_a_link_at_the_place_of_the_page_is_replaced(tmp_path: Path) -> None:
    path, precious = write_run(tmp_path / "run"), tmp_path / "precious"
    precious.write_text("mine")
    (path / "report.html").symlink_to(precious)
    assert write_report(open_run(path)) == path / "report.html"
    assert precious.read_text() == "mine"
    assert not (path / "report.html").is_symlink()


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.record(tmp_path / "run" / "recording")
    page = tmp_path / "run" / "report.html"
    page.write_text("old")
    entries = sorted(tmp_path.rglob("*"))

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_report(open_run(tmp_path / "run"))
    assert page.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == entries
