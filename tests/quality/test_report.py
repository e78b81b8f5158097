"""The report follows the runs: verdicts change with them, and what is missing says so."""

from __future__ import annotations

import doctest
import math
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.quality import cells, factors, pictures, plots, rivals, statistics, tables
from benchmarks.quality.claims import compare, correlations, relevance_verdict, verdict
from benchmarks.quality.document import HEADINGS, read_notes, render
from benchmarks.quality.factors import defaults, sensitivity
from benchmarks.quality.runs import Results, read
from benchmarks.quality.statistics import Estimate
from tests.quality import fake

FIRST = "Growing ranks where the task leans beats uniform LoRA at equal parameters"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def made(folder: Path, effects: dict[str, float] | None = None, **options: object) -> Results:
    runs = fake.study(fake.EFFECTS if effects is None else effects, **options)  # type: ignore[arg-type]
    return read([fake.write(folder / "full.jsonl", runs)])


def row(rows: list[dict[str, str]], column: str, value: str) -> dict[str, str]:
    (found,) = [row for row in rows if row[column] == value]
    return found


@pytest.mark.parametrize(
    ("effect", "expected"),
    [(-0.4, "holds"), (0.0, "undecided"), (0.4, "does not hold, the opposite does")],
)
def test_the_verdict_follows_the_runs(folder: Path, effect: float, expected: str) -> None:
    claims = tables.claims(made(folder, {"drlora": effect}, names=("uniform", "drlora")))
    first = row(claims, "Claim", FIRST)
    assert first["Verdict by test loss"] == expected
    assert first["Verdict by exact match"] == expected
    assert {claim["Verdict by test loss"] for claim in claims[1:]} == {"not run"}


def test_an_effect_of_one_task_alone_is_undecided_beyond_these_tasks(folder: Path) -> None:
    strong = fake.study({"drlora": -1.0}, names=("uniform", "drlora"), tasks=["a"])
    weak = fake.study({"drlora": 0.01}, names=("uniform", "drlora"), tasks=[*"bcdef"])
    results = read([fake.write(folder / "full.jsonl", [*strong, *weak])])
    found = compare(results, "drlora", "uniform")
    assert verdict(found) == "holds, on average over these tasks; undecided beyond"
    assert found.sides()[0] == 1
    assert len(found.groups) == 6


def test_too_few_seeds_never_decide(folder: Path) -> None:
    results = made(folder, tasks=("a", "b"), seeds=2)
    assert row(tables.claims(results), "Claim", FIRST)["Verdict by test loss"] == "undecided"
    assert "no interval: n = 4" in tables.claims(results)[0]["Here, test loss (nats)"]


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
    assert ours["Against uniform"] == "-0.500 [-0.500, -0.500]"
    assert (ours["Wins"], ours["p"], ours["Total rank"]) == ("5/5", "0.062", "24")
    assert ours["Exact match"] == "65.0 ± 7.9"
    assert table[1]["Total rank"] == "30, NOT 24"
    assert "1 ended at another total rank" in render(results)
    assert ours["Trained parameters"] == "1,000"
    assert table[3]["Test loss"] == "cannot run, see The runs"
    assert "- random cannot run: it cannot adapt this\n" in render(results)


def test_best_rates_at_the_edge_are_marked_and_gaps_shown_at_every_rate(folder: Path) -> None:
    results = made(folder, rates={0.1: 0.0, 0.2: 0.3}, tasks=("a",), names=("uniform", "drlora"))
    (setting,) = results.settings()
    assert tables.methods(results, setting)[0]["Rate"] == "0.1 (edge of the grid)"
    (gaps,) = tables.rates(results, setting)
    assert gaps.keys() == {"Method", "0.1", "0.2"}
    assert gaps["0.2"].startswith("-0.4")
    assert tables.edges(results).startswith("Of 2 sweeps (a method in a setting), 2 have")


def test_one_option_at_a_time_is_found_by_what_differs(folder: Path) -> None:
    rows = sensitivity(made(folder))
    assert [(r["Option"], r["DR-LoRA has"], r["Instead"], r["So"]) for r in rows] == [
        ("events", "8", "2", "worse"),
        ("gamma", "1.0", "0.0", "worse"),
        ("gamma", "1.0", "2.0", "undecided"),
    ]
    fields = {line["Field"]: line["Evidence"] for line in defaults(made(folder))}
    assert fields["`gamma`"].startswith("gamma 0.0 for 1.0: +0.")
    assert fields["`growth_interval`"].startswith("events 2 for 8: +0.")
    assert "prune for greedy: +0.19" in fields["`policy`"]
    assert fields["`layer_floor`"] == "not varied"


def test_a_changed_method_is_compared_with_uniform_that_is_changed_alike(folder: Path) -> None:
    names = ("uniform", "drlora", "uniform_beta2", "drlora_beta2")
    results = made(folder, {"uniform_beta2": 0.5, "drlora_beta2": 0.2}, names=names)
    (line,) = tables.same_change(results)
    assert line["Comparison"] == "drlora_beta2 - uniform_beta2"
    assert line["These settings"].startswith("-0.29")
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
    rows = tables.other_trainings(read([fake.write(folder / "full.jsonl", [*usual, *longer])]))
    assert [line["Setting"] for line in rows] == ["embedded / a", "embedded / a, steps 400"]
    assert [line["Counted in the verdicts"] for line in rows] == ["yes", "no"]
    assert rows[0]["drlora - uniform"].startswith("-0.200")
    assert rows[1]["drlora - uniform"].startswith("-0.400")
    assert rows[1]["early - uniform"] == "-"
    assert rows[1]["Exact match of uniform, drlora, early"] == "25.0, 50.0, -"


def test_ranks_that_leave_the_relevant_experts_change_the_verdict(folder: Path) -> None:
    follow = made(folder, names=("drlora",))
    found, answer = relevance_verdict(correlations(follow, "drlora", fake.known))
    assert (round(found.mean, 2), answer) == (0.86, "holds")
    turned = [
        run.model_copy(update={"ranks": {name: [1, 1, 1, 2, 3, 4] for name in fake.LAYERS}})
        for run in fake.study(names=("drlora",))
    ]
    against = read([fake.write(folder / "turned.jsonl", turned)])
    found, answer = relevance_verdict(correlations(against, "drlora", fake.known))
    assert answer == "does not hold, the opposite does"
    assert relevance_verdict(correlations(follow, "drlora"))[1] == "not run"


def test_relevance_and_concentration_have_a_row_for_what_ran(folder: Path) -> None:
    results = made(folder, names=("uniform", "drlora", "without_f"), tasks=("a", "b"))
    rows = tables.relevance_by_method(results, fake.known)
    assert [line["Method"] for line in rows] == ["drlora", "without_f"]
    assert rows[0].keys() == {"Method", "embedded / a"}
    assert rows[0]["embedded / a"] == "+0.86 [+0.86, +0.86]"
    shares = (fake.RELEVANCE["layers.0"] + 0.1) / (fake.RELEVANCE["layers.0"] + 0.1).sum()
    even = -(shares * np.log(shares)).sum() / np.log(6)
    assert [line["Entropy"] for line in tables.concentration(results)] == [f"{even:.3f}"] * 2


def test_held_out_order_is_compared_with_that_of_development(folder: Path) -> None:
    names = ("uniform", "drlora", "prune")
    known = fake.write(folder / "full.jsonl", fake.study(names=names))
    same = fake.write(folder / "heldout_a.jsonl", fake.study(names=names, tasks=("x",)))
    rows, tau = rivals.orders(read([known, same]))
    assert (tau, [line["Method"] for line in rows]) == (1.0, ["drlora", "prune", "uniform"])
    turned = fake.study({"drlora": 0.4, "prune": 0.2}, names=names, tasks=("x",))
    other = fake.write(folder / "heldout_b.jsonl", turned)
    assert rivals.orders(read([known, other]))[1] == -1.0
    assert rivals.orders(read([known]))[0] == []


def test_the_held_out_order_is_of_the_settings_that_have_every_claimed_method(
    folder: Path,
) -> None:
    names = ("uniform", "drlora", "prune")
    known = fake.write(folder / "full.jsonl", fake.study(names=names))
    whole = fake.write(folder / "heldout_a.jsonl", fake.study(names=names, tasks=("x",)))
    few = fake.study({"drlora": 0.4}, names=names[:2], tasks=("y",))
    results = read([known, whole, fake.write(folder / "heldout_b.jsonl", few)])
    rows, tau = rivals.orders(results)
    assert [line["Method"] for line in rows] == ["drlora", "prune", "uniform"]
    assert "Held out (1 settings)" in rows[0]
    assert tau == 1.0


def test_early_growth_is_a_method_and_an_option(folder: Path) -> None:
    """It differs from DR-LoRA in the window only, but claims are about it."""
    names = ("uniform", "drlora", "early")
    results = made(folder, {"drlora": -0.2, "early": -0.3}, names=names, tasks=("a", "b"))
    (option,) = sensitivity(results)
    assert (option["Option"], option["So"]) == ("growth_end + warmup", "better")
    overview = tables.overview(results, results.primary())
    assert [line["Method"] for line in overview] == ["early", "drlora"]
    assert overview[0]["of settings"] == "2"
    claim = row(tables.claims(results), "Claim", "Growing early beats growing late")
    assert claim["Verdict by test loss"] == "holds, on average over these tasks; undecided beyond"


def test_a_rival_must_win_on_held_out_tasks(folder: Path) -> None:
    names = ("uniform", "drlora", "random")
    lucky = {"drlora": -0.2, "random": -0.5}
    known = fake.write(folder / "full.jsonl", fake.study(lucky, names=names))
    tasks = ("x", "y")
    held_out = fake.study({"drlora": -0.2, "random": 0.0}, names=names, tasks=tasks)
    results = read([known, fake.write(folder / "heldout.jsonl", held_out)])
    rival = row(rivals.rivals(results), "Method", "random")
    assert rival["Development"].startswith("-0.29")
    assert rival["Held out, so"] == "worse than DR-LoRA"


def test_figures_show_what_the_tables_say(folder: Path) -> None:
    results = made(folder, tasks=("a",), noise=0.0)
    titles = {figure.layout.title.text: figure for figure in plots.figures(results, fake.known)}
    gaps = titles["embedded / a: test loss against uniform"]
    means = {trace.y[0]: trace.x[0] for trace in gaps.data if len(trace.x) == 1}
    assert means["drlora"] == pytest.approx(-0.4)
    assert means["random"] == pytest.approx(0.0)
    ranks, relevance = titles["embedded / a: drlora"].data
    assert list(ranks.z[0]) == [5, 3, 1, 1, 1, 1]
    assert list(relevance.z[0]) == fake.RELEVANCE["layers.0"].tolist()
    values = [trace.x[0] for trace in titles["Sensitivity to gamma"].data]
    assert values == ["1.0", "0.0", "2.0"]


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


def test_without_runs_every_part_says_so() -> None:
    text = render(Results())
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(HEADINGS)
    for part in text.split("\n## ")[1:]:
        assert "not run" in part.lower() or "not varied" in part


def test_notes_go_below_their_heading(folder: Path) -> None:
    path = folder / "results_notes.md"
    assert read_notes(path) == {}
    path.write_text("For people.\n\n## Defaults\n\nWe keep them.\n\n## In short\n\nIt depends.\n")
    text = render(Results(), read_notes(path))
    assert "## Defaults\n\n*Note.* We keep them.\n" in text
    path.write_text("## Default\n\nWe keep them.\n")
    with pytest.raises(ValueError, match=r"no heading 'Default'; the report has In short, "):
        read_notes(path)


def test_the_command_writes_the_same_page_twice_and_a_page_of_figures(folder: Path) -> None:
    from benchmarks.quality.__main__ import app

    runs = fake.study(tasks=("a",))
    path, page = fake.write(folder / "full.jsonl", runs), folder / "results.md"
    figures = folder / "figures.html"
    command = ["report", str(path), "--output", str(page)]
    done = CliRunner().invoke(app, [*command, "--html", str(figures)])
    assert done.exit_code == 0, done.output
    first = page.read_text()
    assert "| drlora | " in first
    assert str(folder) not in first
    html = figures.read_text()
    assert html.count("plotly-graph-div") >= 5
    assert 'src="http' not in html
    assert CliRunner().invoke(app, command).exit_code == 0
    assert page.read_text() == first


def test_the_command_refuses_a_broken_file_in_a_line_and_leaves_the_page(folder: Path) -> None:
    from benchmarks.quality.__main__ import app

    page, path = folder / "results.md", folder / "full.jsonl"
    page.write_text("as it was")
    path.write_text('{"key": \n')
    done = CliRunner().invoke(app, ["report", str(path), "--output", str(page)])
    assert done.exit_code == 2
    assert "full.jsonl, line 1 is not a run" in done.output
    assert page.read_text() == "as it was"


@pytest.mark.slow
def test_the_page_in_docs_is_what_the_committed_runs_give(tmp_path: Path) -> None:
    from benchmarks.quality.__main__ import app

    root = Path(__file__).parents[2]
    page = tmp_path / "results.md"
    notes = (root / "docs" / "results_notes.md").read_text()
    (tmp_path / "results_notes.md").write_text(notes)
    tracked = ["git", "ls-files", "benchmarks/quality/results"]
    listed = subprocess.run(tracked, cwd=root, capture_output=True, text=True, check=True)
    files = [str(root / line) for line in listed.stdout.splitlines()]
    done = CliRunner().invoke(app, ["report", *files, "--output", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text() == (root / "docs" / "results.md").read_text()
