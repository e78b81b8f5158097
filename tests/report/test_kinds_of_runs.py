"""What figures and pages say of runs that do not simply grow to their budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import Recording, plots
from drlora_core.comparison import gini
from drlora_core.report import event_rows, figures, payload, render_run
from drlora_core.report.headline import headline, tiles
from drlora_core.report.rows import top_experts
from drlora_core.runs import Losses, Run, from_recording, open_run
from tests.core import recorded
from tests.report.runs import write_run

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


def keys(run: Run) -> set[str]:
    cards = [figures.loss_card(run, None), figures.map_card(run)]
    cards += [*figures.growth_cards(run), *figures.spread_cards(run)]
    return {card.key for card in cards if card is not None}


def texts(run: Run) -> str:
    cards = [figures.loss_card(run, None), figures.map_card(run), *figures.growth_cards(run)]
    return " ".join(card.text for card in cards if card is not None)


@pytest.mark.parametrize("changes", [{"r_init": 4}, {"policy": "uniform"}])
def test_static_lora_has_no_events(changes: dict[str, Any], tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", **changes))
    assert run.recording.events, "its events, which place nothing, are recorded"
    assert run.events == ()
    assert event_rows(run) == []
    assert "growth event" not in [trace.name for trace in plots.loss(run).data]
    assert keys(run) == {"loss", "map", "signals", "histogram", "routing"}
    assert "event" not in texts(run)
    assert "slider" not in texts(run)
    page = render_run(run)
    assert "None: ranks are fixed." in page
    assert "Growth did not come to a stop early." not in page
    assert "No quota is left" not in page


def test_ranks_that_differ_from_the_start_are_drawn_as_spread(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", policy="uniform"))
    starts = {"first": np.array([0, 8, 4, 4, 0, 8]), "second": np.array([4, 4, 0, 8])}
    assert {"lorenz", "spread"} <= keys(dataclasses.replace(run, starts=starts))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("prune", "rank events, which cut the least important dimensions."),
        ("move", "rank events, which cut the least important dimensions and give their rank"),
        ("greedy", "growth events, after which experts have more rank"),
    ],
)
def test_captions_say_what_events_do(policy: str, words: str, tmp_path: Path) -> None:
    changes = {"policy": policy, "r_init": {"prune": 8, "move": 4, "greedy": 2}[policy]}
    run = open_run(write_run(tmp_path / "run", **changes))
    said = texts(run)
    assert words in said
    assert ("g starts anew" in said) == (policy != "prune")
    assert ("the next event catches up" in said) == (policy == "greedy")
    names = [trace.name for trace in plots.loss(run).data]
    assert run.event_noun in names
    assert tiles(run)[2].label == f"{run.event_noun}s"


def test_the_saved_adapter_is_described_where_the_training_went_on(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    last = open_run(path)
    outcomes = json.loads((path / "result.json").read_text())
    outcomes[0]["ranks"] = {name: row.tolist() for name, row in last.events[0].ranks.items()}
    (path / "result.json").write_text(json.dumps(outcomes))
    run = open_run(path)
    assert (last.kept, run.kept) == (3, 1)
    saved = int(run.ranks[1].sum())
    assert f"an earlier step, with {saved:,} rank units" in headline(run)[1]
    assert top_experts(run)[0]["rank at the end"] == run.ranks[1].max()
    assert tiles(run)[1].value == f"{saved:,}"
    drawn = plots.rank_map(run)
    assert [trace.visible for trace in drawn.data] == [False, True, False, False]
    assert drawn.layout.sliders[0].active == 1
    assert sum(plots.rank_histogram(run).data[0].y) == 10
    outcomes[0]["ranks"] = {"first": [1]}  # another model's
    (path / "result.json").write_text(json.dumps(outcomes))
    assert open_run(path).kept == 3


def test_losses_of_preferences_are_not_called_nats(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert plots.loss(open_run(path)).layout.yaxis.title.text == "nats per token"
    (path / "run.yaml").write_text("method: dpo\nsteps: 30\n")
    run = open_run(path)
    assert plots.loss(run).layout.yaxis.title.text == "DPO loss"
    assert "nats" not in render_run(run)


def test_the_map_of_a_run_without_events_tells_its_last_step(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", steps=6)
    run = open_run(tmp_path / "run")
    assert "at step 6" in plots.rank_map(run).data[0].hovertemplate


def test_a_longer_run_is_not_cut_off_and_is_told_apart(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    long = Losses.from_rows([{"step": step, "loss": 1.0} for step in range(1, 51)])
    other = dataclasses.replace(run, name=run.policy, losses=long)
    drawn = plots.loss(run, other)
    assert drawn.layout.xaxis.range == (0, 50)
    names = [trace.name for trace in drawn.data if trace.showlegend is not False]
    assert len(set(names)) == len(names)


def test_figures_are_left_as_they_were(tmp_path: Path) -> None:
    card = figures.map_card(open_run(write_run(tmp_path / "run")))
    before = card.variants[""].to_json()
    payload.pack_figures([card])
    assert card.variants[""].to_json() == before


def test_of_many_events_some_are_drawn_with_the_first_and_the_last() -> None:
    changes = {"growth_interval": 1, "growth_end": 400, "r_target": 40, "r_max": 80}
    rng = np.random.default_rng(0)
    layers = {name: rng.random((400, size)) for name, size in recorded.LAYERS.items()}
    recording = Recording.from_arrays(layers, layers, config=recorded.config(**changes))
    run = from_recording(recording)
    assert len(run.events) == 396
    assert len(run.history.steps) <= 60
    assert {run.events[0].step, run.events[-1].step} <= set(run.history.steps.tolist())
    total = plots.total_rank(run).data[1]
    assert len(total.x) <= 130
    assert (total.x[0], total.x[-1], total.y[-1]) == (0, 400, 400)
    for x, y in zip(total.x[:-1], total.y[:-1], strict=True):
        number = run.event_steps.index(x) + 1 if x else 0
        assert y == run.ranks[number].sum()
    drawn = plots.spread(run).data
    last = [gini(run.ranks[-1][part]) for part in run.places.values()]
    assert drawn[-1].y[-1] == pytest.approx(np.mean(last))
    mapped = plots.rank_map(run)
    for trace in mapped.data[1:-1]:
        step = int(trace.hovertemplate.rpartition("at step ")[2].partition("<")[0])
        assert step in run.history.steps
        assert step <= int(trace.name.removeprefix("step "))
