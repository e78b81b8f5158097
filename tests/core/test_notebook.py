"""What objects show: one screen, harmless HTML, and never a step that is closed for it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import AllocatorConfig, AllocatorEngine, PolicyError, Recording, notebook, replay
from tests.core import recorded

HOSTILE = "</td></table><script>alert('x')</script><img src=http://a.b/c>&\ud800\n" + "n" * 10_000
LINES, CHARACTERS = 40, 8_000


class Cells(HTMLParser):
    """The tags of a page and the text of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.cells += [""] * (tag in ("td", "th", "caption"))

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def read_html(shown: Any) -> list[str]:
    """The cells of what a notebook shows, which is one table of one screen and nothing else."""
    text = shown._repr_html_()
    text.encode("utf-8")
    assert len(text) < CHARACTERS
    parsed = Cells()
    parsed.feed(text)
    assert parsed.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    return [cell.strip() for cell in parsed.cells]


def check_line(shown: Any, expected: str) -> None:
    assert repr(shown) == str(shown)
    assert re.fullmatch(expected, repr(shown)), repr(shown)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[AllocatorEngine, Recording]:
    path = tmp_path_factory.mktemp("notebook") / "run"
    engine, _ = recorded.record(path)
    return engine, Recording.open(path)


def test_lines(run: tuple[AllocatorEngine, Recording]) -> None:
    engine, recording = run
    layers = "2 layers, 10 experts"
    check_line(engine, rf"AllocatorEngine\(greedy, step 20, {layers}, total rank 40 of 40\)")
    check_line(recording.events[0], r"GrowthEvent\(step=8, 2 layers, \+6 ranks, total 26\)")
    check_line(recording, rf"Recording\(20 steps, {layers}, 3 events, policy greedy, path='.*'\)")
    check_line(recording.layer("first"), r"LayerRecord\('first', 20 steps, 6 experts\)")
    check_line(replay(recording), r"Replay\(greedy, 20 steps, 3 events, total rank 40\)")
    assert eval(repr(engine.config), {"AllocatorConfig": AllocatorConfig}) == engine.config


def test_tables(run: tuple[AllocatorEngine, Recording]) -> None:
    engine, recording = run
    cells = read_html(engine)
    first = engine.ranks("first")
    row = ["first", "6", str(first.min()), f"{first.mean():.2f}", str(first.max()), "24"]
    assert cells[cells.index("first") :][:6] == row
    assert "16" in read_html(recording.events[0])  # the total of the first layer, 6 x 2 + 4
    cells = read_html(recording)
    assert cells[-3:] == ["second", "4", "18"]
    cells = read_html(engine.config)
    assert cells[0] == "AllocatorConfig: 3 growth events, after steps 8 to 16"
    assert cells[cells.index("gamma") + 1] == "1.0"
    assert set(AllocatorConfig.model_fields) <= set(cells)


def test_pruning_shows_what_it_cuts(tmp_path: Path) -> None:
    _, events = recorded.record(tmp_path / "run", policy="prune", r_init=8)
    check_line(events[0], r"GrowthEvent\(step=8, 2 layers, -\d+ ranks, total \d+\)")


def test_moving_shows_what_it_moves(tmp_path: Path) -> None:
    _, events = recorded.record(tmp_path / "run", policy="move", r_init=4, move_share=1.0)
    moved = sum(int(cut.sum()) for cut in events[0].cut.values())
    assert moved > 0
    check_line(events[0], rf"GrowthEvent\(step=8, 2 layers, \+0 ranks, {moved} moved, total 40\)")


def test_an_engine_without_layers_is_shown() -> None:
    engine = AllocatorEngine(AllocatorConfig(growth_interval=10**7, growth_end=10**12))
    check_line(engine, r"AllocatorEngine\(greedy, step 0, 0 layers, 0 experts\)")
    read_html(engine)
    assert "after steps 10000200 to 999990000200" in read_html(engine.config)[0]


def test_many_experts_and_hostile_names_fill_one_screen() -> None:
    layers = {f"{number}{HOSTILE}": 384 for number in range(100)}
    engine = recorded.build(recorded.config(), layers)
    assert "100 layers of 384 experts" in repr(engine)
    recorded.drive(engine, 8)
    routing = {name: np.ones((12, 384)) for name in layers}
    ranks = {name: np.full((12, 384), 2) for name in layers}
    recording = Recording.from_arrays(routing, ranks=ranks)
    event = replay(recording, recorded.config(use_importance=False)).events[0]
    assert len(repr(recording.layer(next(iter(layers))))) < 200
    for shown in (engine, event, recording):
        assert len(repr(shown)) < 200
        cells = read_html(shown)
        assert "and 80 more" in cells
        assert sum("<script>" in cell for cell in cells) == notebook.SHOWN_ROWS  # as text
        assert shown._repr_html_().count("\n") < LINES


def test_what_is_shown_closes_no_step() -> None:
    engine = recorded.build(recorded.config())
    closed: list[str] = []
    engine.defer(lambda: closed.append("now"))
    assert "step 0, another one pending" in repr(engine)
    assert "another one pending" in read_html(engine)[0]
    assert engine.pending
    assert closed == []


def test_text_is_shown_with_its_line_breaks() -> None:
    text = notebook.Text("a\nb")
    assert repr(text) == "a\nb" == text


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("gredy", "no policy 'gredy'; did you mean 'greedy'?"),
        ("", "no policy ''; known: 'greedy'"),
        ("prune", r"name a built-in policy in the configuration: AllocatorConfig\(policy='prune'"),
        ("random", r"name a built-in policy in the configuration: AllocatorConfig\(policy='random"),
        (3, "must be a callable that takes an AllocationRequest, got 3"),
    ],
)
def test_what_is_no_policy_is_refused_at_once(policy: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        AllocatorEngine(AllocatorConfig(), policy=policy)
    with pytest.raises(PolicyError, match=message):
        replay(Recording.from_arrays({"a": np.ones((1, 2))}), AllocatorConfig(), policy)
