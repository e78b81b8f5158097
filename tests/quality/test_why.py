"""The page about why growing helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import study, why
from benchmarks.quality.details import detail_pages
from benchmarks.quality.factors import main_methods
from benchmarks.quality.methods import METHODS
from benchmarks.quality.notes import Figures
from benchmarks.quality.runs import Results, read
from tests.quality import fake

STUDY = {m.name: m for m in study.load(study.find_profile("why")).methods}
NAMES = ("uniform", "early", "hindsight", "known_ranks")
GAINS = {"early": -0.4, "known_ranks": -0.4}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    for name in NAMES:
        monkeypatch.setitem(fake.METHODS, name, STUDY[name])
    runs = fake.study(GAINS, names=NAMES, tasks=("a", "b"), noise=0.001)
    runs += fake.study(GAINS, names=("uniform", "early"), tasks=("c",))
    return read([fake.write(tmp_path / "why.jsonl", runs)])


def test_every_method_of_the_study_is_explained() -> None:
    explained = {name for methods in why.EXPLANATIONS.values() for name in methods}
    assert explained | {"uniform"} == STUDY.keys()
    assert explained - METHODS.keys() == why.ONLY_HERE


def test_methods_are_compared_with_every_reference(results: Results) -> None:
    rows = {row["Method"]: row for row in why.effects(results)}
    assert list(rows) == ["`early`", "`hindsight`", "`known_ranks`"]
    assert rows["`early`"]["Minus `early`"] == "-"
    known = [rows["`known_ranks`"][f"Minus `{base}`"] for base in ("uniform", "early", "hindsight")]
    assert [text.split(" [")[0] for text in known] == [
        Figures(results).effect("known_ranks", base).split(" [")[0]
        for base in ("uniform", "early", "hindsight")
    ]
    assert float(known[0].split(" [")[0]) == pytest.approx(-0.4, abs=0.01)
    assert float(known[1].split(" [")[0]) == pytest.approx(0.0, abs=0.01)
    assert [row["Explanation"] for row in rows.values()] == ["References", "", "Order of experts"]


def test_only_settings_of_the_study_count(results: Results) -> None:
    assert [setting.task for setting in why.full_settings(results)] == ["a", "b"]
    (row, *_) = why.by_setting(results)
    assert list(row) == ["Method", "embedded / a", "embedded / b"]
    assert row["embedded / a"].endswith("] at 0.001")


def test_methods_of_this_page_are_left_out_of_others(results: Results) -> None:
    assert main_methods(results, results.settings()) == ["uniform", "early", "hindsight"]
    mine = [page.name for page in detail_pages(results, {}, None) if "known_ranks" in page.text]
    assert mine == ["why_growing.md"]


def test_notes_compare_in_several_settings(results: Results) -> None:
    figures = Figures(results)
    both = figures.effect("early", where=["embedded / a", "embedded / b"])
    assert both == figures.effect("early", where=["embedded / b", "embedded / a"])
    assert both not in (figures.effect("early", where="embedded / a"), figures.effect("early"))
    assert figures.won("early", where=["embedded / a", "embedded / b"]) == "10 of 10"
