"""The report follows the runs: verdicts change with them, and what is missing says so."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.quality import (
    alternatives,
    cells,
    claim_tables,
    factors,
    pictures,
    plots,
    statistics,
    tables,
)
from benchmarks.quality.claims import (
    ALL_CLAIMS,
    compare,
    correlations,
    relevance_verdict,
    verdict,
)
from benchmarks.quality.details import detail_pages
from benchmarks.quality.factors import sensitivity
from benchmarks.quality.notes import Figures
from benchmarks.quality.runs import read
from benchmarks.quality.statistics import Estimate
from tests.quality import fake

FIRST = "DR-LoRA beats uniform LoRA"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def row(rows: list[dict[str, str]], column: str, value: str) -> dict[str, str]:
    (found,) = [row for row in rows if row[column] == value]
    return found


@pytest.mark.parametrize(
    ("effect", "expected"),
    [(-0.4, "supported"), (0.0, "inconclusive"), (0.4, "contradicted")],
)
def test_the_verdict_follows_the_runs(folder: Path, effect: float, expected: str) -> None:
    results = fake.results(folder, {"drlora": effect}, names=("uniform", "drlora"))
    claims = claim_tables.claims(results, ALL_CLAIMS)
    assert row(claims, "Claim", FIRST)["Verdict"] == expected
    assert {claim["Verdict"] for claim in claims[1:]} == {"not run"}
    (by_match,) = claim_tables.exact_matches(results)
    assert by_match["Verdict"] == expected


def test_an_effect_of_one_task_alone_is_supported_on_these_tasks_only(folder: Path) -> None:
    strong = fake.study({"drlora": -1.0}, names=("uniform", "drlora"), tasks=["a"])
    weak = fake.study({"drlora": 0.01}, names=("uniform", "drlora"), tasks=[*"bcdef"])
    results = read([fake.write(folder / "full.jsonl", [*strong, *weak])])
    found = compare(results, "drlora", "uniform")
    assert verdict(found) == "supported on these tasks"
    assert [setting.task for setting in found.on_side(-1)] == ["a"]
    assert len(found.groups) == 6


def test_a_claim_counts_the_settings_of_its_mean_rank(folder: Path) -> None:
    small = fake.study({"early": -0.1}, names=("uniform", "early"), noise=0.001)
    large = [
        run.model_copy(
            update={
                "spec": run.spec.model_copy(
                    update={"training": run.spec.training.model_copy(update={"r_target": 8})}
                )
            }
        )
        for run in fake.study({"early": -0.3}, names=("uniform", "early"), tasks="ab", noise=0.001)
    ]
    results = read([fake.write(folder / "full.jsonl", [*small, *large])])
    claims = claim_tables.claims(results, ALL_CLAIMS)
    by_rank = {
        2: row(claims, "Claim", "Early growth beats uniform LoRA"),
        8: row(claims, "Claim", "Early growth beats uniform LoRA, mean rank 8"),
    }
    assert [by_rank[rank]["Settings"] for rank in (2, 8)] == ["5", "2"]
    assert by_rank[2]["Test loss"].startswith("-0.1")
    assert by_rank[8]["Test loss"].startswith("-0.3")
    assert Figures(results).effect("early", where=8) == by_rank[8]["Test loss"]


def test_too_few_seeds_never_decide(folder: Path) -> None:
    results = fake.results(folder, tasks=("a", "b"), seeds=2)
    first = row(claim_tables.claims(results, ALL_CLAIMS), "Claim", FIRST)
    assert first["Verdict"] == "inconclusive"
    assert "no interval: n = 4" in first["Test loss"]


def test_exceptions_name_the_settings_in_which_a_claim_fails(folder: Path) -> None:
    names = ("uniform", "drlora")
    runs = [
        run
        for effect, tasks in ((-0.4, "abc"), (0.4, "d"), (0.0, "efg"))
        for run in fake.study({"drlora": effect}, names=names, tasks=[*tasks], noise=0.001)
    ]
    results = read([fake.write(folder / "full.jsonl", runs)])
    first = row(claim_tables.claims(results, ALL_CLAIMS), "Claim", FIRST)
    assert first["Exceptions"] == "worse: embedded / d; unclear: 3 settings"
    assert (first["Runs better"].split(" of ")[1], first["Settings"]) == ("35", "7")


def test_the_table_of_a_setting_is_what_its_runs_are(folder: Path) -> None:
    runs = [
        *(fake.record("uniform", 1.0 + 0.1 * seed, seed=seed) for seed in range(5)),
        *(fake.record("drlora", 0.5 + 0.1 * seed, seed=seed) for seed in range(5)),
        fake.record("prune", 0.8, total_rank=30),
        fake.record("random", 0.0, refused="it cannot adapt this"),
    ]
    results = read([fake.write(folder / "full.jsonl", runs)])
    (setting,) = results.settings()
    table = tables.methods(results, setting)
    assert [line["Method"] for line in table] == ["drlora", "prune", "uniform", "random"]
    ours = table[0]
    assert ours["Test loss"] == "0.700 ± 0.158"
    assert ours["Minus uniform"] == "-0.500 [-0.500, -0.500]"
    assert (ours["Seeds better"], ours["p"], ours["Total rank"]) == ("5/5", "0.062", "24")
    assert ours["Exact match"] == "65.0 ± 7.9"
    assert table[1]["Total rank"] == "30, NOT 24"
    (runs,) = [p.text for p in detail_pages(results, {}, None) if p.title == "Runs"]
    assert "1 ended at a total rank other than the budget" in " ".join(runs.split())
    assert ours["Trained parameters"] == "1,000"
    assert table[3]["Test loss"] == "refused"
    assert "- random cannot adapt this model: it cannot adapt this\n" in runs


def test_best_rates_at_the_edge_are_marked_and_gaps_shown_at_every_rate(folder: Path) -> None:
    results = fake.results(
        folder, rates={0.1: 0.0, 0.2: 0.3}, tasks=("a",), names=("uniform", "drlora")
    )
    (setting,) = results.settings()
    assert tables.methods(results, setting)[0]["Learning rate"] == "0.1 (edge of the grid)"
    (gaps,) = tables.rates(results, setting)
    assert gaps.keys() == {"Method", "0.1", "0.2"}
    assert gaps["0.2"].startswith("-0.4")
    assert tables.edges(results).startswith("In 2 of 2 learning-rate sweeps ")


def test_one_option_at_a_time_is_found_by_what_differs(folder: Path) -> None:
    rows = sensitivity(fake.results(folder))
    assert [(r["Option"], r["Default"], r["Variant"], r["Verdict"]) for r in rows] == [
        ("events", "8", "2", "worse"),
        ("gamma", "1.0", "0.0", "worse"),
        ("gamma", "1.0", "2.0", "inconclusive"),
    ]
    assert rows[0]["Effect on test loss"].startswith("+0.")


def test_a_changed_method_is_compared_with_uniform_that_is_changed_alike(folder: Path) -> None:
    names = ("uniform", "drlora", "uniform_beta2", "drlora_beta2")
    results = fake.results(folder, {"uniform_beta2": 0.5, "drlora_beta2": 0.2}, names=names)
    (line,) = claim_tables.same_change(results)
    assert line["Comparison"] == "drlora_beta2 - uniform_beta2"
    assert line["Seeds resampled"].startswith("-0.29")
    assert len(results.settings()) == 5


def test_other_training_of_a_task_is_shown_beside_the_one_that_counts(folder: Path) -> None:
    names = ("uniform", "drlora")
    usual = fake.study({"drlora": -0.2}, names=names, tasks=("a",), seeds=6, noise=0.0)
    longer = [
        run.model_copy(
            update={
                "spec": run.spec.model_copy(
                    update={"training": fake.TRAINING.model_copy(update={"steps": 400})}
                ),
                "test_exact_match": 0.5 if run.spec.method.name == "drlora" else 0.25,
            }
        )
        for run in fake.study({"drlora": -0.4}, names=names, tasks=("a",), noise=0.0)
    ]
    rows = claim_tables.other_trainings(
        read([fake.write(folder / "full.jsonl", [*usual, *longer])])
    )
    assert [line["Setting"] for line in rows] == ["embedded / a", "embedded / a, steps 400"]
    assert [line["Used for the verdicts"] for line in rows] == ["yes", "no"]
    assert rows[0]["drlora - uniform"].startswith("-0.200")
    assert rows[1]["drlora - uniform"].startswith("-0.400")
    assert rows[1]["early - uniform"] == "-"
    assert rows[1]["Exact match of uniform, drlora, early"] == "25.0, 50.0, -"


def test_ranks_that_leave_the_relevant_experts_change_the_verdict(folder: Path) -> None:
    follow = fake.results(folder, names=("drlora",))
    found, answer = relevance_verdict(correlations(follow, "drlora", fake.known))
    assert (round(found.mean, 2), answer) == (0.86, "supported")
    turned = [
        run.model_copy(update={"ranks": {name: [1, 1, 1, 2, 3, 4] for name in fake.LAYERS}})
        for run in fake.study(names=("drlora",))
    ]
    against = read([fake.write(folder / "turned.jsonl", turned)])
    found, answer = relevance_verdict(correlations(against, "drlora", fake.known))
    assert answer == "contradicted"
    assert relevance_verdict(correlations(follow, "drlora"))[1] == "not run"


def test_relevance_and_concentration_have_a_row_for_what_ran(folder: Path) -> None:
    results = fake.results(folder, names=("uniform", "drlora", "without_f"), tasks=("a", "b"))
    rows = tables.relevance_by_method(results, fake.known)
    assert [line["Method"] for line in rows] == ["drlora", "without_f"]
    assert rows[0].keys() == {"Method", "embedded / a"}
    assert rows[0]["embedded / a"] == "+0.86 [+0.86, +0.86]"
    shares = (fake.RELEVANCE["layers.0"] + 0.1) / (fake.RELEVANCE["layers.0"] + 0.1).sum()
    even = -(shares * np.log(shares)).sum() / np.log(6)
    assert [line["Entropy"] for line in claim_tables.concentration(results)] == [f"{even:.3f}"] * 2


def test_held_out_order_is_compared_with_that_of_development(folder: Path) -> None:
    names = ("uniform", "drlora", "prune")
    known = fake.write(folder / "full.jsonl", fake.study(names=names))
    same = fake.write(folder / "heldout_a.jsonl", fake.study(names=names, tasks=("x",)))
    rows, tau = alternatives.ranking(read([known, same]))
    assert (tau, [line["Method"] for line in rows]) == (1.0, ["drlora", "prune", "uniform"])
    turned = fake.study({"drlora": 0.4, "prune": 0.2}, names=names, tasks=("x",))
    other = fake.write(folder / "heldout_b.jsonl", turned)
    assert alternatives.ranking(read([known, other]))[1] == -1.0
    assert alternatives.ranking(read([known]))[0] == []


def test_the_held_out_order_is_of_the_settings_that_have_every_claimed_method(
    folder: Path,
) -> None:
    names = ("uniform", "drlora", "prune")
    known = fake.write(folder / "full.jsonl", fake.study(names=names))
    whole = fake.write(folder / "heldout_a.jsonl", fake.study(names=names, tasks=("x",)))
    few = fake.study({"drlora": 0.4}, names=names[:2], tasks=("y",))
    results = read([known, whole, fake.write(folder / "heldout_b.jsonl", few)])
    rows, tau = alternatives.ranking(results)
    assert [line["Method"] for line in rows] == ["drlora", "prune", "uniform"]
    assert "Held out (1 settings)" in rows[0]
    assert tau == 1.0


def test_early_growth_is_a_method_and_an_option(folder: Path) -> None:
    """It differs from DR-LoRA in the window only, but claims are about it."""
    names = ("uniform", "drlora", "early")
    results = fake.results(folder, {"drlora": -0.2, "early": -0.3}, names=names, tasks=("a", "b"))
    (option,) = sensitivity(results)
    assert (option["Option"], option["Verdict"]) == ("growth_end + warmup", "better")
    overview = tables.overview(results, results.primary())
    assert [line["Method"] for line in overview] == ["early", "drlora"]
    assert overview[0]["Settings"] == "2"
    claim = row(claim_tables.claims(results, ALL_CLAIMS), "Claim", "Early growth beats late growth")
    assert claim["Verdict"] == "supported on these tasks"


def test_a_rival_must_win_on_held_out_tasks(folder: Path) -> None:
    names = ("uniform", "drlora", "random")
    lucky = {"drlora": -0.2, "random": -0.5}
    known = fake.write(folder / "full.jsonl", fake.study(lucky, names=names))
    tasks = ("x", "y")
    held_out = fake.study({"drlora": -0.2, "random": 0.0}, names=names, tasks=tasks)
    results = read([known, fake.write(folder / "heldout.jsonl", held_out)])
    rival = row(alternatives.alternatives(results), "Method", "random")
    assert rival["Development"].startswith("-0.29")
    assert rival["Verdict, held out"] == "worse"


def test_figures_show_what_the_tables_say(folder: Path) -> None:
    results = fake.results(folder, tasks=("a",), noise=0.0)
    titles = {figure.layout.title.text: figure for figure in plots.figures(results, fake.known)}
    gaps = titles["embedded / a: test loss minus that of uniform"]
    means = {trace.y[0]: trace.x[0] for trace in gaps.data if len(trace.x) == 1}
    assert means["drlora"] == pytest.approx(-0.4)
    assert means["random"] == pytest.approx(0.0)
    ranks, relevance = titles["embedded / a: drlora"].data
    assert list(ranks.z[0]) == [5, 3, 1, 1, 1, 1]
    assert list(relevance.z[0]) == fake.RELEVANCE["layers.0"].tolist()
    values = [trace.x[0] for trace in titles["Sensitivity to gamma"].data]
    assert values == ["1.0", "0.0", "2.0"]


def test_curves_put_each_point_in_its_row_and_column() -> None:
    drawn = pictures.curves({"up": {1: 0.0, 4: 2.0}, "flat": {1: 0.0, 4: 0.0}}, height=3)
    assert drawn.splitlines() == [
        "+2.000 |         a",
        "+1.000 |",
        "+0.000 | ab      b",
        "       +-----------------",
        "         1       4",
        "a up, b flat",
    ]


def test_pictures_in_characters_hold_means_and_zero() -> None:
    drawn = pictures.intervals(
        {"long": Estimate(-0.5, -1.0, 0.0, 5), "b": Estimate(1.0, -math.inf, math.inf, 2)}
    )
    first, second, axis = drawn.splitlines()
    start = len("long ")
    assert (first[start], first[start + 15], first[start + 30]) == ("├", "●", "┤")
    assert (second[start + 30], second[start + 60]) == ("│", "●")
    assert axis.split() == ["-1.000", "+1.000"]
    drawn = pictures.heat_map({"l": np.array([1.0, 2.5])}, {"l": np.array([0.0, 1.0])})
    assert drawn.splitlines()[0].split() == ["l", "rank", "1.0", "2.5"]
    assert drawn.splitlines()[1].split() == ["relevance", "██"]


@pytest.mark.parametrize("module", [cells, factors, pictures, statistics], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).attempted
    assert doctest.testmod(module).failed == 0
