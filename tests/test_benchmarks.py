"""The benchmarks run, at a tiny shape, and count what they say; no time is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    blocks,
    ceilings,
    counts,
    features,
    goals,
    memory,
    profile_step,
    report,
    roofline,
    rounds,
    scaling,
)
from benchmarks.blocks import Case, Shape
from benchmarks.methods import DYNAMIC, EAGER, PEFT, RANK, STATIC, Training, drlora, peft

TINY = Shape(experts=4, hidden=32, intermediate=16, top_k=2, tokens=32, layers=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny shape, short turns, results in a folder of the test."""
    monkeypatch.setitem(blocks.SHAPES, "tiny", TINY)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(rounds, "TURN", 0.0)
    monkeypatch.setattr(scaling, "BASE", Shape(2, 16, 8, 1, 8))
    monkeypatch.setattr(ceilings, "LEAST", 0.0)
    monkeypatch.setattr(ceilings, "COPIED", 2**12)
    monkeypatch.setattr(ceilings, "PEAK_SIZE", 16)
    return tmp_path


def written(folder: Path) -> str:
    (path,) = folder.iterdir()
    return path.read_text()


@pytest.mark.slow
def test_goals(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = scaling.Fit.to("tokens", scaling.DRLORA, {1: 1.0, 2: 4.0, 4: 16.0})
    monkeypatch.setattr(scaling, "measure", lambda _: [fit])
    goals.main(["tiny"], ["bfloat16"], 2, True)
    lines = written(quick).splitlines()
    for what in (goals.STEP, goals.OVER_PEFT, goals.MEMORY, goals.GROWING, goals.R_MAX_TIME):
        assert sum(line.startswith(f"| {what} | tiny, bfloat16 |") for line in lines) == 1
    state = f"| {goals.STATE.format(4)} | tiny, bfloat16 | <= 1.00 | 1.000 | yes |"
    assert state in lines
    assert (
        "| exponent of time against tokens | scaling | <= 1.05 | 2.000 ± 0.000 | no, by 0.950 |"
        in lines
    )


def test_scaling(quick: Path) -> None:
    scaling.main(1)
    swept = ["tokens | drlora", "tokens | frozen", "experts | drlora", "rank | drlora"]
    assert all(f"| {name} | " in written(quick) for name in swept)


@pytest.mark.slow
def test_features(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, backend="eager": compiled(m, backend=backend))
    counted = [features.graphs(Case(TINY, torch.float32).blocks(), torch.zeros(1, 4, TINY.hidden))]
    monkeypatch.setattr(features, "graphs_of_a_model", lambda: (counted[0], 2))  # it takes long
    features.main("tiny", 1)
    assert all(f"| {name} | " in written(quick) for name in features.SAME | features.OTHER)
    assert "has 2 graphs with LoRA and 1 without" in written(quick)


def test_features_give_the_gradients_of_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(TINY, torch.float32)
    names = [name for name in features.SAME if name != "torch.compile"]
    monkeypatch.setattr(features, "SAME", {name: features.SAME[name] for name in names})
    found = features.deviations({name: features.SAME[name](case) for name in names})
    assert max(found.values()) < 1e-6


def test_roofline(quick: Path) -> None:
    roofline.main(["tiny"], ["float32"], 1)
    assert "| tiny, float32 | low-rank products | " in written(quick)


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    profile_step.main(STATIC, "tiny", "float32", 1, 3)
    assert "Self CPU" in capsys.readouterr().out


def addmm_operations(total: list[int], left: list[int], right: list[int], **_: object) -> int:
    """torch counts ``addmm`` but not ``addmm_``."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize(("method", "rank"), [(EAGER, 0), (STATIC, RANK)])
def test_operations_are_counted_right(method: str, rank: int) -> None:
    training = goals.METHODS[method](Case(TINY, torch.float32))
    in_place = {torch.ops.aten.addmm_: addmm_operations}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        training.backward()
    gemms = counts.base_gemms(TINY) + counts.router_gemms(TINY)
    gemms += counts.lora_gemms(TINY, rank) if rank else []
    assert counter.get_total_flops() == sum(gemm.operations for gemm in gemms)


def test_memory_of_a_step_and_of_training() -> None:
    kept: list[torch.Tensor] = []

    def prepare() -> None:
        kept.append(torch.zeros(256) + 0.0)  # two of 1 KiB at once, one is kept

    def step() -> None:
        kept.append(kept[0] + 1.0)

    assert memory.training_peaks(prepare, step) == (1024, 2048)


def test_the_experts_own_products_are_12_s_h_i() -> None:
    pairs = TINY.tokens * TINY.top_k
    wanted = TINY.layers * 12 * pairs * TINY.hidden * TINY.intermediate
    assert sum(gemm.operations for gemm in counts.base_gemms(TINY)) == wanted


def test_trained_numbers_are_those_of_the_methods() -> None:
    case = Case(TINY, torch.bfloat16)
    for build in (drlora(r_max=4 * RANK, growing=False), peft):
        training = build(case)
        training()
        numbers = counts.trained(TINY, RANK)
        steps = 4 * TINY.layers * 4  # Adam's step count of A and B of two projections
        assert training.state_bytes() == 16 * numbers + steps * 1


def test_ranks_of_the_dynamic_method_have_grown() -> None:
    training: Training = goals.METHODS[DYNAMIC](Case(TINY, torch.float32))
    assert training.adapter is not None
    before = [ranks.sum() for ranks in training.adapter.ranks().values()]
    training()
    training()
    after = [ranks.sum() for ranks in training.adapter.ranks().values()]
    budget = TINY.experts * RANK
    assert all(0.9 * budget <= total < budget for total in before)
    assert all(total == budget for total in after)
    assert len(set(next(iter(training.adapter.ranks().values())).tolist())) > 1


def test_methods_share_the_frozen_weights() -> None:
    case = Case(TINY, torch.float32)
    first, second = case.blocks(), case.blocks("eager")
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert left.data_ptr() == right.data_ptr()


def test_peft_adapts_the_experts() -> None:
    training = goals.METHODS[PEFT](Case(TINY, torch.float32))
    before = training.state_bytes()
    training()
    assert training.state_bytes() > before > 0
