"""Interventions around the optimizer step: what they change, and that the budget stays."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality import interventions, policies, redrawing, study
from benchmarks.quality.adapting import check_kind
from benchmarks.quality.errors import StudyError
from benchmarks.quality.interventions import INTERVENTIONS, scaled_updates
from benchmarks.quality.records import Method
from benchmarks.quality.redrawing import Redraw
from benchmarks.quality.training import run
from drlora_core import AllocatorConfig
from drlora_core.testing import make_request
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.lora.slots import Layout, SlotTable
from tests.quality.studies import TINY, make_spec

torch.set_num_threads(1)
WHY = {m.name: m for m in study.load(study.find_profile("why")).methods}
CONFIG = AllocatorConfig(  # events after steps 2 and 4
    r_init=1, r_target=2, r_max=4, warmup_steps=0, growth_interval=2, growth_end=4, policy="uniform"
)


def make_lora(ranks: list[int]) -> ExpertLoRA:
    """A layer of 4 experts with 8 slots; B is not 0, as after some training."""
    table = SlotTable(8, 4, CONFIG.r_max, Layout.POOLED)
    lora = ExpertLoRA("e", {"up": ProjectionShape(3, 5)}, table, 1.0, 0.0, seed=0)
    lora.birth(table.grow(np.array(ranks)))
    with torch.no_grad():
        lora.items()[0][1].lora_B.copy_(1.0 + torch.arange(40.0).reshape(8, 5))
    return lora


def adapter_of(lora: ExpertLoRA) -> Any:
    return SimpleNamespace(layers={"e": SimpleNamespace(lora=lora)})


def step(lora: ExpertLoRA, optimizer: torch.optim.Optimizer, around: Any) -> dict[str, Tensor]:
    """A step with the gradient 1; what was added to A and B, one number a row."""
    before = {name[-1]: p.detach().clone() for name, p in lora.named_parameters()}
    for parameter in lora.parameters():
        parameter.grad = torch.ones_like(parameter)
    with around(optimizer):
        optimizer.step()
    after = {name[-1]: p.detach() for name, p in lora.named_parameters()}
    return {name: (after[name] - before[name])[:, 0] for name in before}


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["redraw_least", "hindsight_redraw_extra", "known_ranks", "early_newborn_warmup",
     "hindsight_scale_rank"],
)  # fmt: skip
def test_methods_of_the_study_keep_their_budget(name: str) -> None:
    short = TINY.model_copy(update={"steps": 10, "events": 2, "evaluations": 1})
    method = WHY[name].model_copy(
        update={"training": {"warmup": 0.1, "growth_end": 0.7} if WHY[name].training else {}}
    )
    record = run(make_spec(method, training=short))
    assert record.total_rank == record.budget == 128
    assert record.test_loss < record.start_loss


# -- redraws -------------------------------------------------------------------------------------


def train_and_redraw(kind: type[Redraw], choose: Any, ranks: list[int]) -> list[list[int]]:
    """Four steps with two redraws; checks the redrawn rows of each, and returns them."""
    lora = make_lora(ranks)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1)
    redraw, found = kind(lora, CONFIG, 0, choose), []
    starts = {name: p.detach().clone() for name, p in lora.named_parameters()}
    for _ in range(4):
        known = set(redraw.redrawn)
        for parameter in lora.parameters():  # row 7 has the smallest gradient
            parameter.grad = torch.linspace(1.0, 0.1, 8)[:, None] * torch.ones_like(parameter)
        redraw.observe()
        optimizer.step()
        moved = {name: p.detach().clone() for name, p in lora.named_parameters()}
        redraw.close(optimizer)
        rows = sorted(set(redraw.redrawn) - known)
        check_rows(lora, optimizer, rows, moved, starts)
        found.append([int(row) for row in rows])
    return found


def check_rows(
    lora: ExpertLoRA,
    optimizer: torch.optim.Optimizer,
    rows: list[int],
    moved: dict[str, Tensor],
    starts: dict[str, Tensor],
) -> None:
    """The rows are new and as if newborn; the others are as the step left them."""
    others = [row for row in range(8) if row not in rows]
    for name, parameter in lora.named_parameters():
        assert torch.equal(parameter[others], moved[name][others])
        assert all(state[others].ne(0).all() for state in states(optimizer, parameter))
        assert all(state[rows].eq(0).all() for state in states(optimizer, parameter))
        if name.endswith("lora_B"):
            assert not parameter[rows].any()
        elif rows:
            assert (parameter[rows] != moved[name][rows]).all()
            assert (parameter[rows] != starts[name][rows]).all()
            assert (parameter[rows].abs() <= 3**-0.5).all()


def states(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    return [optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")]


def test_redraws_are_as_many_as_growth_and_start_fresh() -> None:
    even = [2, 2, 2, 2]
    least = train_and_redraw(Redraw, least_by_gradient, even)
    assert least == [[], [6, 7], [], [4, 5]]
    drawn = train_and_redraw(Redraw, redrawing.choose_random, even)
    assert [len(rows) for rows in drawn] == [0, 2, 0, 2]
    assert len({row for rows in drawn for row in rows}) == 4
    assert drawn == train_and_redraw(Redraw, redrawing.choose_random, even)


def least_by_gradient(redraw: Redraw, generator: np.random.Generator, count: int) -> np.ndarray:
    """``choose_least``, with importance that follows the gradient and not the size of B."""
    redraw.importance = np.linspace(1.0, 0.1, 8)
    return redrawing.choose_least(redraw, generator, count)


def test_extra_rows_are_those_that_growth_would_have_added() -> None:
    ranks = [4, 1, 1, 2]
    drawn = train_and_redraw(Redraw, redrawing.choose_extra, ranks)
    extra = np.flatnonzero(make_lora(ranks).table.position >= 1)
    assert sorted(row for rows in drawn for row in rows) == extra.tolist()


def test_importance_is_the_sensitivity_of_a_row() -> None:
    lora = make_lora([2, 2, 2, 2])
    redraw = Redraw(lora, CONFIG, 0, redrawing.choose_least)
    expected = np.zeros(8)
    for parameter in lora.parameters():
        parameter.grad = torch.randn(parameter.shape)
        expected += (parameter * parameter.grad).abs().mean(dim=1).detach().numpy()
    redraw.observe()
    np.testing.assert_allclose(redraw.importance, 0.1 * expected, rtol=1e-6)
    assert redrawing.choose_least(redraw, np.random.default_rng(0), 1) == [expected.argmin()]


class KeepsItsState(Redraw):
    def _reset(self, slots: np.ndarray, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing."""


class KeepsItsRows(Redraw):
    def _redraw(self, slots: np.ndarray) -> None:
        """Do nothing."""


class DrawsTheSameRows(Redraw):
    def _redraw(self, slots: np.ndarray) -> None:
        self.lora.draw()
        self.lora.items()[0][1].clear_B(torch.from_numpy(slots))


class RedrawsAll(Redraw):
    def _redraw(self, slots: np.ndarray) -> None:
        super()._redraw(np.arange(8))


@pytest.mark.parametrize("broken", [KeepsItsState, KeepsItsRows, DrawsTheSameRows, RedrawsAll])
def test_broken_redraws_are_found(broken: type[Redraw]) -> None:
    with pytest.raises(AssertionError):
        train_and_redraw(broken, redrawing.choose_random, [2, 2, 2, 2])


def test_rows_may_stay_while_their_state_starts_anew() -> None:
    lora = make_lora([2, 2, 2, 2])
    optimizer = torch.optim.SGD(lora.parameters(), lr=1.0, momentum=0.9)
    around = interventions.Redrawing(
        adapter_of(lora), CONFIG, choose=redrawing.choose_extra, keep_rows=True
    )
    for expected in (-1.0, -1.9):
        for by_row in step(lora, optimizer, around).values():
            assert by_row.tolist() == pytest.approx([expected] * 8)
    (redraw,) = around._redraws
    for parameter in lora.parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert not momentum[redraw.redrawn].any()
        assert int(momentum.any(dim=1).sum()) == 6


def test_redrawn_rows_move_as_if_adam_had_just_begun() -> None:
    """Under a constant gradient, every step of a fresh Adam is the learning rate."""
    lora = make_lora([2, 2, 2, 2])
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, weight_decay=0.0, betas=(0.9, 0.999))
    around = interventions.Redrawing(adapter_of(lora), CONFIG, choose=redrawing.choose_random)
    for _ in range(4):
        step(lora, optimizer, around)
    (redraw,) = around._redraws
    assert redraw.redrawn.size == 4
    for _ in range(3):
        for by_row in step(lora, optimizer, around).values():
            torch.testing.assert_close(by_row, torch.full((8,), -0.1), rtol=1e-3, atol=0.0)
    plain = step(lora, optimizer, contextlib.nullcontext)["A"][redraw.redrawn]
    assert ((plain + 0.1).abs() > 0.003).all()  # what the correction corrects


# -- scaled updates ------------------------------------------------------------------------------


def test_newborn_rows_warm_up() -> None:
    lora = make_lora([1, 1, 1, 1])
    optimizer = torch.optim.SGD(lora.parameters(), lr=1.0)
    around = interventions.NewbornWarmup(adapter_of(lora), CONFIG, steps=4)
    assert step(lora, optimizer, around)["A"][:4].tolist() == [-1.0] * 4
    lora.birth(lora.table.grow(np.array([2, 0, 0, 0])))
    for expected in (0.25, 0.5, 0.75, 1.0, 1.0):
        added = step(lora, optimizer, around)
        for name in "AB":
            torch.testing.assert_close(added[name][:4], torch.full((4,), -1.0))
            torch.testing.assert_close(added[name][4:6], torch.full((2,), -expected))


@pytest.mark.parametrize(("power", "factors"), [(1.0, [0.5, 2.0]), (0.5, [0.5**0.5, 2.0**0.5])])
def test_rank_scale_follows_the_rank(power: float, factors: list[float]) -> None:
    lora = make_lora([4, 1, 1, 1])
    optimizer = torch.optim.SGD(lora.parameters(), lr=1.0)
    around = interventions.RankScale(adapter_of(lora), CONFIG, power=power)
    added = step(lora, optimizer, around)
    assert added["A"].tolist() == pytest.approx([-1.0] * 8, rel=1e-5)
    expected = [-factors[0]] * 4 + [-factors[1]] * 3 + [-1.0]
    assert added["B"].tolist() == pytest.approx(expected, rel=1e-5)


class Product(nn.Module):
    """x -> scale x A^T B."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = scale
        self.lora_A = nn.Parameter(torch.randn(2, 3, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x @ self.lora_A.T @ self.lora_B


def test_scaling_the_updates_of_B_is_scaling_the_product() -> None:
    scaled, updates = Product(3.0), Product(1.0)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(7, size, generator=generator) for size in (3, 5))
    for model in (scaled, updates):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0, eps=1e-12)
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            factors = np.full(2, 3.0) if model is updates else None
            with scaled_updates(model, None, factors):  # type: ignore[arg-type]
                optimizer.step()
    torch.testing.assert_close(updates(x), scaled(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(updates.lora_B, 3.0 * scaled.lora_B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(updates.lora_A, scaled.lora_A, rtol=1e-4, atol=1e-5)


# -- known ranks, kinds --------------------------------------------------------------------------


def test_growth_toward_known_ranks_ends_there() -> None:
    final = [np.array([1, 1, 4, 2]), np.array([3, 2, 1, 2])]
    allocate = policies.toward(final)
    for layer, wanted in enumerate(final):
        ranks = np.ones(4, dtype=np.int64)
        for event in range(2):
            request = make_request(
                quota=2, ranks=ranks.tolist(), limits=(4 - ranks).tolist(), seed=(0, event, layer)
            )
            ranks = ranks + allocate(request)
        assert ranks.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("drlora + newborn warmups", "no intervention 'newborn warmups'; did you mean"),
        ("drlor + newborn warmup", "no kind 'drlor'"),
        ("peft_lora + newborn warmup", "interventions need a LoRA of drlora"),
    ],
)
def test_unknown_kinds_are_refused(kind: str, message: str) -> None:
    with pytest.raises(StudyError, match=f"method 'mine': .*{message}"):
        check_kind(Method(name="mine", kind=kind))


def test_every_intervention_can_be_named() -> None:
    for name in INTERVENTIONS:
        check_kind(Method(name="mine", kind=f"hindsight + {name}"))
