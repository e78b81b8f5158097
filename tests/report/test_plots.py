"""Figures hold the numbers that the recording gives when they are computed the slow way."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError, Recording, plots, replay
from drlora_core.comparison import chance_overlap, entropy, gini, overlap, spearman
from drlora_core.errors import UnknownLayerError
from drlora_core.plots.inequality import lorenz_curve
from drlora_core.plots.loss import running_mean
from drlora_core.plots.style import harmless, layer_labels, to_short
from drlora_core.runs import Run, as_run, from_recording, open_run
from tests.core import recorded
from tests.report.runs import write_run

pytest.importorskip("plotly")
CLOSE: dict[str, float] = {"rtol": 5e-4}  # figures round to three digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("plots") / "run"))


@pytest.fixture(scope="module")
def signals_by_step(run: Run) -> dict[int, dict[str, dict[str, Any]]]:
    """f, g and S of an engine that is fed again, after each step and before its event."""
    engine, seen = AllocatorEngine(run.config), {}
    for name, size in run.layers.items():
        engine.add_layer(name, size)
    for row in range(run.recording.steps):
        for name in run.layers:
            record = run.recording.layer(name)
            if record.presence[row]:
                engine.observe(
                    name, routing=record.routing_at(row), importance=record.importance_at(row)
                )
            else:
                engine.skip(name)
        seen[row + 1] = {
            name: {
                "routing": engine.routing_frequency(name),
                "importance": engine.rank_importance(name),
                "saliency": engine.saliency(name),
            }
            for name in run.layers
        }
        engine.step()
    return seen


FIGURES: list[Callable[[Any], Any]] = [
    plots.rank_map,
    plots.total_rank,
    plots.rank_histogram,
    plots.rank_against_routing,
    plots.lorenz,
    plots.spread,
    lambda run: plots.trajectories(run, "second"),
    lambda run: plots.signals(run, "second"),
    lambda run: plots.rank_difference(run, run),
    lambda run: plots.overlap_by_layer(run, run),
]


@pytest.mark.parametrize("draw", FIGURES)
def test_a_recording_is_drawn_as_its_replay(draw: Callable[[Any], Any], run: Run) -> None:
    drawn, replayed = draw(run.recording), draw(replay(run.recording))
    drawn.layout.title = replayed.layout.title = None
    assert drawn.to_json() == replayed.to_json()


def test_the_map_has_a_trace_for_every_event_of_which_the_slider_shows_one(
    run: Run, signals_by_step: Any
) -> None:
    figure = plots.rank_map(run)
    assert len(figure.data) == len(run.events) + 1
    for trace, ranks in zip(figure.data, run.ranks, strict=True):
        np.testing.assert_array_equal(np.asarray(trace.z)[0], ranks[:6])
        np.testing.assert_array_equal(np.asarray(trace.z)[1, :4], ranks[6:])
        assert np.isnan(np.asarray(trace.z, dtype=float)[1, 4:]).all()  # no such expert
    for event, trace in zip(run.events[:-1], figure.data[1:-1], strict=True):
        details = np.asarray(trace.customdata)
        seen = signals_by_step[event.step]["first"]
        np.testing.assert_allclose(details[0, :, 2], event.saliency["first"], **CLOSE)
        np.testing.assert_allclose(details[0, :, 0], seen["routing"], **CLOSE)
        np.testing.assert_allclose(details[0, :, 1], seen["importance"], **CLOSE)
    assert [trace.visible for trace in figure.data] == [False, False, False, True]
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "8", "12", "16"]
    for number, step in enumerate(slider.steps):
        assert step.args[0]["visible"] == [each == number for each in range(4)]
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == run.ranks.max()
    assert figure.layout.yaxis.autorange == "reversed"  # layer 0 on top
    assert list(figure.data[0].y) == ["first", "second"]


def test_trajectories_highlight_the_experts_with_most_rank_and_band_the_others(run: Run) -> None:
    figure, ranks = plots.trajectories(run, "first"), run.ranks[:, :6]
    high, low, mean, *lines = figure.data
    names = {int(line.name.removeprefix("expert ")) for line in lines}
    rest = sorted(set(range(6)) - names)
    assert names == {number for number in range(6) if ranks[-1, number] > ranks[-1].mean()}
    for line in lines:
        wanted = ranks[:, int(line.name.removeprefix("expert "))]
        np.testing.assert_array_equal(line.y, [*wanted, wanted[-1]])
        assert list(line.x) == [0, 8, 12, 16, 20]
    for trace, edge in ((high, np.max), (low, np.min), (mean, np.mean)):
        wanted = edge(ranks[:, rest], axis=1)
        np.testing.assert_allclose(trace.y, [*wanted, wanted[-1]])


def test_signals_are_those_that_the_engine_had(run: Run, signals_by_step: Any) -> None:
    figure = plots.signals(run, "first")
    axes = {"y": "routing", "y2": "importance", "y3": "saliency"}
    drawn = [trace for trace in figure.data if trace.name and trace.name.startswith("expert")]
    assert {trace.yaxis for trace in drawn} == set(axes)
    for trace in drawn:
        expert = int(trace.name.removeprefix("expert "))
        assert list(trace.x) == list(range(1, 21))
        wanted = [signals_by_step[step]["first"][axes[trace.yaxis]][expert] for step in trace.x]
        np.testing.assert_allclose(trace.y, wanted, **CLOSE)
    assert {shape.x0 for shape in figure.layout.shapes} == {8, 12, 16}
    with pytest.raises(UnknownLayerError, match="did you mean 'first'"):
        plots.signals(run, "firs")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": "prune", "r_init": 6, "r_target": 4},
        {"policy": "move", "r_init": 4, "r_min": 0},
        {"r_init": 0},
        {"scope": "global", "policy": "rescored"},
        {"use_routing": False, "gamma": 2.0},
    ],
)
def test_the_history_at_an_event_is_what_it_was_decided_by(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    recorded.record(tmp_path / "run", **changes)
    drawn = as_run(Recording.open(tmp_path / "run"))
    assert drawn.events
    for event in drawn.events:
        row = list(drawn.history.steps).index(event.step)
        for name, part in drawn.places.items():
            seen = drawn.history.saliency[row, part]
            np.testing.assert_allclose(seen, event.saliency[name], rtol=1e-12)
    for draw in FIGURES:
        draw(drawn)  # cuts and rank 0 can be drawn


@pytest.mark.parametrize(
    "changes", [{}, {"quota": 4}, {"policy": "prune", "r_init": 6}, {"policy": "uniform"}]
)
def test_total_rank_is_drawn_against_plan_and_budget(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    recorded.record(tmp_path / "run", **changes)
    drawn = as_run(Recording.open(tmp_path / "run"))
    plan, total, budget = plots.total_rank(drawn).data
    assert list(total.y[:-1]) == [int(row.sum()) for row in drawn.ranks]
    assert list(budget.y) == [4 * 10, 4 * 10]
    sizes, config = drawn.layers.values(), drawn.config
    wanted = [sum(config.scheduled_total(n, k) for n in sizes) for k in range(4)]
    assert list(plan.y) == [*wanted, wanted[-1]]
    assert list(plan.x) == [0, 8, 12, 16, 20]


def test_axes_of_steps_run_over_the_whole_run(run: Run) -> None:
    assert run.last_step == 30  # planned; 20 are recorded, and the last event was at 16
    for figure in (
        plots.loss(run),
        plots.total_rank(run),
        plots.trajectories(run, "first"),
        plots.signals(run, "first"),
        plots.spread(run),
    ):
        assert list(figure.layout.xaxis.range) == [0, 30]
    assert plots.trajectories(run.recording, "first").data[-1].x[-1] == 20


def test_the_histogram_counts_experts(run: Run) -> None:
    (bars,) = plots.rank_histogram(run).data
    final = run.ranks[-1].tolist()
    assert dict(zip(bars.x, bars.y, strict=True)) == {r: final.count(r) for r in set(final)}


def test_rank_is_drawn_against_mean_routing(run: Run) -> None:
    figure = plots.rank_against_routing(run)
    (points,) = figure.data
    routing, part = run.recording.layer("second").routing, run.places["second"]
    wanted = [np.mean([row[i] for row in routing if not np.isnan(row[i])]) for i in range(4)]
    np.testing.assert_allclose(np.asarray(points.x)[part], wanted, **CLOSE)
    np.testing.assert_array_equal(points.y, run.ranks[-1])
    values = []
    for name, place in run.places.items():
        phi = run.recording.layer(name).routing
        values.append(spearman(np.nanmean(phi, axis=0), run.ranks[-1][place]))
    assert figure.layout.title.text.endswith(f"correlation {np.mean(values):.2f}")
    assert points.customdata[7][0] == "second"
    assert int(points.customdata[7][1]) == 1


def test_many_experts_are_counted_in_cells() -> None:
    rng = np.random.default_rng(0)
    recording = Recording.from_arrays({f"layer {n}": rng.random((6, 700)) for n in range(5)})
    config = recorded.config(warmup_steps=0, growth_interval=2, growth_end=6, use_importance=False)
    run = from_recording(recording, config)
    (cells,) = plots.rank_against_routing(run).data
    counts = np.asarray(cells.customdata)
    assert np.nansum(counts) == 3500
    np.testing.assert_allclose(np.asarray(cells.z), np.log10(counts), rtol=1e-6)
    for rank in range(counts.shape[0]):
        assert np.nansum(counts[rank]) == (run.ranks[-1] == rank).sum()


def test_inequality_is_that_of_the_ranks(run: Run) -> None:
    curves = plots.lorenz(run).data
    ranks = np.sort(run.ranks[-1])
    np.testing.assert_allclose(curves[-1].y, [ranks[:n].sum() / ranks.sum() for n in range(11)])
    np.testing.assert_allclose(curves[-1].x, np.arange(11) / 10)
    assert [curve.name for curve in curves] == ["all equal", "start", "after 1 event", "end"]
    lines = {line.name: line for line in plots.spread(run).data if line.name}
    for name, measure in (("entropy", entropy), ("Gini", gini)):
        wanted = [np.mean([measure(row[p]) for p in run.places.values()]) for row in run.ranks]
        np.testing.assert_allclose(lines[name].y, [*wanted, wanted[-1]])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=400))
def test_a_lorenz_curve_rises_below_the_diagonal(ranks: list[int]) -> None:
    x, y = lorenz_curve(np.array(ranks))
    assert len(x) <= 201
    assert (np.diff(y) >= -1e-12).all()
    assert (y <= x + 1e-12).all()
    assert y[-1] == pytest.approx(1.0 if sum(ranks) else 0.0)


def test_the_loss_is_that_of_the_log(run: Run) -> None:
    data = {trace.name: trace for trace in plots.loss(run).data if trace.name}
    log = 3.0 - np.arange(1, 21) / 10  # step 15 was logged once more, without a value
    thin, *_ = plots.loss(run).data
    np.testing.assert_allclose(thin.y, log, **CLOSE)
    np.testing.assert_allclose(data["greedy, training"].y, running_mean(log), **CLOSE)
    assert list(data["greedy, held out"].x) == [0, 10]
    assert list(data["greedy, held out"].y) == [3.0, 2.5]
    assert list(data["uniform, held out"].y) == [1.5]
    assert list(data["growth event"].x) == [8, 12, 16]
    other = dataclasses.replace(run, name="<i>other")
    names = [trace.name for trace in plots.loss(run, other).data]
    assert "&lt;i&gt;other, training" in names
    with pytest.raises(LayoutError, match=r"no losses: open a folder with a metrics\.jsonl"):
        plots.loss(run.recording)


def test_two_runs_are_compared(run: Run) -> None:
    other = as_run(replay(run.recording, recorded.config(policy="uniform")))
    figure = plots.rank_difference(run, other)
    (cells,) = figure.data
    np.testing.assert_array_equal(np.asarray(cells.z)[1, :4], run.ranks[-1][6:] - 4)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    bars, marks = plots.overlap_by_layer(run, other).data
    for number, part in enumerate(run.places.values()):
        pair = run.ranks[-1][part], other.ranks[-1][part]
        assert bars.y[number] == overlap(*pair)
        assert marks.y[number] == pytest.approx(overlap(*pair))  # even ranks: chance is all
    smaller = Recording.from_arrays({"first": np.ones((4, 3))}, {"first": np.ones((4, 3))})
    with pytest.raises(LayoutError, match="different layers"):
        plots.rank_difference(run, replay(smaller, recorded.config()))


def test_chance_is_the_mean_over_all_orders() -> None:
    rng = np.random.default_rng(3)
    one, two = rng.integers(0, 9, 12), rng.integers(0, 9, 12)
    shuffled = [overlap(one, rng.permutation(two)) for _ in range(4000)]
    assert chance_overlap(one, two) == pytest.approx(np.mean(shuffled), abs=0.01)


def test_recorded_decisions_of_an_unknown_policy_are_drawn(run: Run) -> None:
    fields = {name: getattr(run.recording, name) for name in vars(run.recording)}
    lazy = Recording(**(fields | {"policy": "Lazy"}))
    assert as_run(lazy).policy == "Lazy"
    np.testing.assert_array_equal(as_run(lazy).ranks, run.ranks)
    with pytest.raises(LayoutError, match="policy 'Lazy', whose code is not recorded"):
        plots.rank_map(Recording(**(fields | {"policy": "Lazy", "events": ()})))
    with pytest.raises(LayoutError, match="no configuration of its own"):
        plots.rank_map(Recording(**(fields | {"config": None})))
    with pytest.raises(LayoutError, match="not a dict"):
        plots.rank_map({})  # type: ignore[arg-type]


def test_unequal_starting_ranks_are_drawn() -> None:
    config = AllocatorConfig(r_init=0, r_target=4, r_max=16, policy="uniform")
    engine = AllocatorEngine.from_profile(config, {"a": (np.array([0.1, 0.5, 0.4]), None)})
    ranks = np.tile(engine.ranks("a"), (6, 1))
    recording = Recording.from_arrays(
        {"a": np.full((6, 3), 0.5)}, {"a": np.ones((6, 3))}, ranks={"a": ranks}, config=config
    )
    (frame,) = plots.rank_map(recording).data
    np.testing.assert_array_equal(np.asarray(frame.z)[0], [0, 12, 0])
    for draw in FIGURES[:6]:
        draw(recording)


@given(st.text(max_size=80))
def test_names_are_made_harmless(name: str) -> None:
    text = harmless(name)
    assert "<" not in text
    assert ">" not in text
    assert html.unescape(text).isprintable()
    assert text.encode().decode() == text


def test_labels_of_layers_are_short_and_different() -> None:
    assert layer_labels(["a.1.x", "a.2.x"]) == ["1", "2"]
    assert layer_labels(["only"]) == ["only"]
    assert layer_labels(["a<b", "c"]) == ["a&lt;b", "c"]
    alike = layer_labels([f"{'x' * 30}{n}{'y' * 30}" for n in range(3)])
    assert len(set(alike)) == 3


@given(st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1))
def test_short_numbers_are_close(values: list[float]) -> None:
    np.testing.assert_allclose(to_short(values), values, rtol=2.5e-4, atol=1e-37)


def test_short_numbers_keep_what_is_missing() -> None:
    assert np.isnan(to_short([np.nan])).all()
    assert np.isinf(to_short([np.inf])).all()
