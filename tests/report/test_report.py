"""The HTML report and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import LayoutError, plots
from drlora_core.recording import Recording
from drlora_core.replay import replay
from drlora_core.report import event_rows, render
from tests.core import recorded

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("report") / "run"
    recorded.record(path)
    return Recording.open(path)


def test_figures_show_the_ranks(recording: Recording) -> None:
    result = replay(recording)
    cells = np.asarray(plots.rank_map(result).data[0].z)
    np.testing.assert_array_equal(cells[0], result.final_ranks["first"])
    np.testing.assert_array_equal(cells[1, :4], result.final_ranks["second"])
    assert np.isnan(cells[1, 4:]).all()
    lines = {line.name: list(line.y) for line in plots.total_rank(result).data}
    assert lines["mean"][0] == 2.0
    assert lines["mean"][-1] == 4.0
    experts = plots.trajectories(result, "second").data
    assert [line.y[-1] for line in experts] == result.final_ranks["second"].tolist()
    bars = plots.rank_histogram(result).data[0]
    assert sum(bars.y) == 10


@pytest.mark.parametrize(
    "draw",
    [
        plots.rank_map,
        plots.total_rank,
        plots.rank_histogram,
        lambda run: plots.trajectories(run, "second"),
    ],
)
def test_a_recording_is_drawn_as_its_replay(draw: Any, recording: Recording) -> None:
    assert draw(recording).to_json() == draw(replay(recording)).to_json()


def test_a_run_of_an_unknown_policy_is_not_drawn(recording: Recording) -> None:
    fields = {name: getattr(recording, name) for name in vars(recording)}
    with pytest.raises(LayoutError, match="policy 'Lazy'"):
        plots.rank_map(Recording(**(fields | {"policy": "Lazy"})))


def test_event_rows_add_up(recording: Recording) -> None:
    rows = event_rows(replay(recording))
    assert sum(row["units_placed"] for row in rows) == 20
    assert rows[-1]["mean_rank"] == 4.0


def test_a_page_of_a_replay_under_other_settings_and_with_hostile_names() -> None:
    hostile = "</script><script>alert('x')</script>"
    routing = {hostile: np.random.default_rng(0).random((20, 4))}
    routing[hostile][:, 0] = 0.0  # a finding names the layer
    recording = Recording.from_arrays(routing)
    config = recorded.config(use_importance=False, scope="global", r_max=6)
    page = render(recording, config, title=f"a & b {hostile}")
    assert hostile not in page
    assert "<script>alert" not in page
    assert "<h1>a &amp; b &lt;/script&gt;" in page
    assert "Experts by final rank" in page
    assert "cannot know how they would have changed" in page


def test_a_page_says_what_differs_and_what_was_torn(recording: Recording) -> None:
    routing = recording.routing.copy()
    routing[2, 0] = 1e6
    fields = {name: getattr(recording, name) for name in vars(recording)}
    changed = Recording(**(fields | {"routing": routing, "notes": ("torn tail",)}))
    page = render(changed)
    assert "The replay differs from the run: step 8" in page
    assert '<p class="note">torn tail</p>' in page


def test_a_page_names_the_policy_of_the_run(recording: Recording) -> None:
    fields = {name: getattr(recording, name) for name in vars(recording)}
    page = render(Recording(**(fields | {"policy": "Lazy"})))
    assert "policy greedy. The run itself used policy Lazy." in page
    assert "repeats the run" not in page


def test_a_run_without_events_has_a_page() -> None:
    recording = Recording.from_arrays({"a": np.ones((4, 3))})
    page = render(recording, recorded.config(use_importance=False))
    assert "<p>None.</p>" in page


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = pytest.importorskip("drlora_core.cli.report")
    recorded.record(tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    page.write_text("old")
    entries = sorted(tmp_path.rglob("*"))

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        command.report(tmp_path / "run")
    assert page.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == entries
