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
from drlora_core.plots.experts import highlighted
from drlora_core.report import event_rows, figures, payload, render_run
from drlora_core.report.headline import headline, tiles
from drlora_core.report.rows import top_experts
from drlora_core.report.verdicts import check
from drlora_core.runs import Losses, Run, from_recording, open_run
from drlora_core.runs.result import Outcome
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
    problems = [each for each in check(run).findings if each.name == "budget"]
    assert [each.message for each in problems] == [
        f"the saved adapter is that of an earlier step, with {saved} of 40 rank units"
    ]
    assert "met exactly" not in " ".join(check(run).good)
    decided = run.history.signals[2][run.history.row_at(run.events[0].step)]
    assert top_experts(run)[0]["S"] in decided
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


def test_a_run_that_ended_before_its_events_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=9)
    (problem,) = [each for each in check(open_run(path)).findings if each.name == "budget"]
    assert problem.message.startswith("the run ended before 2 of its 3 events, with ")
    (path / "result.json").unlink()  # it goes on
    assert [each for each in check(open_run(path)).findings if each.name == "budget"] == []


def test_the_headline_names_one_winner_or_counts_several(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", max_growth=1))
    gained = run.final - run.ranks[0]
    assert (tied := int((gained == gained.max()).sum())) > 1
    assert headline(run)[2].endswith(f"; {tied} experts gained the most, up to rank 5.")
    starts = {name: run.final[part] - 1 for name, part in run.places.items()}
    starts["second"][3] = 0
    won = headline(dataclasses.replace(run, starts=starts))[2]
    assert f"most of all to expert 3 of second, from rank 0 to {run.final[9]}." in won
    pruned = open_run(write_run(tmp_path / "pruned", policy="prune", r_init=8))
    half = np.sort(pruned.final)[::-1].cumsum() * 2 >= pruned.final.sum()
    few = int(half.argmax()) + 1
    assert f"Half of the rank that is left belongs to {few} experts of 10" in headline(pruned)[2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"step": 20, "eval_loss": 1.5}], "After 20 of 20 steps the held-out loss is 1.500."),
        (
            [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 4.0}, {"step": 9, "eval_loss": 1}],
            "After 9 of 20 steps the held-out loss is 1.000; it began at 2.000.",
        ),
        ([{"step": 1, "loss": 3.0}], "After 1 of 20 steps the training loss is 3.000."),
        ([], "The statistics of 20 steps were recorded, of 2 layers, 10 experts, and no loss."),
    ],
)
def test_the_headline_tells_the_loss_that_is_known(
    rows: list[dict[str, Any]], words: str, tmp_path: Path
) -> None:
    recorded.record(tmp_path / "run")
    run = open_run(tmp_path / "run")
    losses = Losses.from_rows(rows)
    assert headline(dataclasses.replace(run, losses=losses))[0] == words


@pytest.mark.parametrize(
    ("after", "words", "change"),
    [
        (2.00001, "stayed at 2.000", "unchanged"),
        (1.0, "fell from 2.000 to 1.000", "50% lower"),
        (3.0, "did not fall: it went from 2.000 to 3.000", "50% higher"),
    ],
)
def test_losses_that_read_the_same_are_the_same(
    after: float, words: str, change: str, tmp_path: Path
) -> None:
    recorded.record(tmp_path / "run")
    outcome = Outcome(method="greedy", loss_before=2.0, loss_after=after, tokens_per_second=12345.6)
    run = dataclasses.replace(open_run(tmp_path / "run"), outcome=outcome)
    assert f"the held-out loss {words} nats" in headline(run)[0]
    assert tiles(run)[0].detail == change


def test_numbers_of_tables_are_read_as_numbers(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    outcomes = json.loads((path / "result.json").read_text())
    outcomes[0]["tokens_per_second"] = 12345.6
    (path / "result.json").write_text(json.dumps(outcomes))
    page = " ".join(render_run(open_run(path)).split())
    assert '<td class="number">12,346 </td>' in page
    assert '<td class="number">3.000 </td>' in page
    assert "<dd>1</dd>" in page  # gamma, as it is written


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one = open_run(write_run(tmp_path / "a" / "run"))
    two = open_run(write_run(tmp_path / "b" / "run", gamma=0.0))
    assert plots.rank_difference(one, two).layout.title.text == "Rank: run minus run (other)"
    assert "<bdi>run (other)</bdi>" in render_run(one, two)


def test_losses_in_other_units_are_not_set_side_by_side(tmp_path: Path) -> None:
    one, path = open_run(write_run(tmp_path / "one")), write_run(tmp_path / "two")
    (path / "run.yaml").write_text("method: dpo\n")
    two = open_run(path)
    assert "two in DPO loss, training" in [trace.name for trace in plots.loss(one, two).data]
    assert "<td><bdi>two</bdi>" not in render_run(one, two)
    assert "<td><bdi>two</bdi>" in render_run(one, dataclasses.replace(two, recipe=None))


def test_a_trace_has_no_importance_to_complain_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "trace.npz", weight_sum=rng.random((20, 2, 8)), tokens=np.full(20, 64))
    run = open_run(tmp_path / "trace.npz")
    assert not run.config.use_importance
    assert "importance" not in " ".join(each.name for each in check(run).findings)


def test_of_experts_of_equal_rank_the_first_to_get_there_are_shown() -> None:
    """Two experts are full at the end; the one with more routing was full earlier."""
    routing = {"a": np.array([[0.1, 0.6, 0.02, 0.9]] * 20)}
    config = recorded.config(use_importance=False, max_growth=None, r_max=6)
    run = from_recording(Recording.from_arrays(routing), config)
    assert run.final.tolist()[1] == run.final.tolist()[3] == 6
    assert [row["expert"] for row in top_experts(run)][:2] == [3, 1]
    assert highlighted(run, "a")[:2] == [3, 1]


def test_lines_tell_layer_and_signals(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    line = plots.trajectories(run, "second").data[-1]
    assert line.hovertemplate.startswith("layer second, expert ")
    expert = run.places["second"].start + int(line.name.removeprefix("expert "))
    for x, f, g, s in zip(line.x[1:-1], *np.array(line.customdata)[1:-1].T, strict=True):
        row = run.history.steps.tolist().index(x)
        want = [signal[row, expert] for signal in run.history.signals]
        np.testing.assert_allclose([f, g, s], want, rtol=5e-4)
    assert plots.signals(run, "second").data[-1].hovertemplate.startswith("layer second, expert ")


def test_no_rank_has_no_lorenz_curve(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", r_init=0)
    names = [trace.name for trace in plots.lorenz(open_run(tmp_path / "run")).data]
    assert "start" not in names
    assert "end" in names
