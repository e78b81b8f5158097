"""The page about why growing helps."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.quality import study, why
from benchmarks.quality.details import detail_pages
from benchmarks.quality.effective_rank import effective_ranks
from benchmarks.quality.factors import main_methods
from benchmarks.quality.methods import METHODS
from benchmarks.quality.notes import Figures
from benchmarks.quality.runs import Results, read
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.lora.slots import Layout, SlotTable
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


@pytest.mark.parametrize(
    ("A", "B", "expected"),
    [
        (torch.eye(3), torch.eye(3), 3.0),
        (torch.eye(3), torch.ones(3, 3), 1.0),
        (torch.ones(3, 3), torch.eye(3), 1.0),
        (torch.eye(3)[:2], torch.eye(4)[:2], 2.0),
        (torch.eye(2), torch.diag(torch.tensor([3.0, 1.0])), math.exp(0.3250830)),
        (torch.eye(3), torch.zeros(3, 4), 0.0),
    ],
)
def test_effective_rank(A: Tensor, B: Tensor, expected: float) -> None:
    table = SlotTable(len(A), 1, len(A), Layout.POOLED)
    lora = ExpertLoRA("e", {"up": ProjectionShape(*A.shape[1:], *B.shape[1:])}, table, 1, 0, 0)
    lora.birth(table.grow(np.array([len(A)])))
    ((_, slots),) = lora.items()
    slots.lora_A.data, slots.lora_B.data = A, B
    adapter: Any = SimpleNamespace(layers={"e": SimpleNamespace(lora=lora)})
    (found,) = effective_ranks(adapter)["e"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_effective_ranks_are_of_the_large_experts(results: Results, tmp_path: Path) -> None:
    assert why.collapse(results) == []  # these runs have none
    measured = {
        "ranks": {name: [5, 3, 1, 1, 1, 1] for name in fake.LAYERS},
        "effective_ranks": dict.fromkeys(fake.LAYERS, [2.0] + [1.0] * 5),
    }
    again = [
        run.model_copy(update=measured)
        if run.spec.method.name == "known_ranks" and run.spec.task == "a"
        else run
        for run in results.records
    ]
    both = read([tmp_path / "why.jsonl", fake.write(tmp_path / "again.jsonl", again)])
    assert len(both.records) == len(results.records)
    assert why.collapse(both) == [
        {"Method": "`known_ranks`", "embedded / a": "2.0 of 5.0", "embedded / b": "-"}
    ]


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
