"""Memory of a step, counted in bytes of tensors and not by the operating system."""

from __future__ import annotations

import torch

from benchmarks.blocks import Case, Shape
from benchmarks.memory import peak_bytes
from benchmarks.methods import EAGER, FROZEN, METHODS, PEFT, STATIC, drlora

SHAPE = Shape(experts=16, hidden=96, intermediate=64, top_k=4, tokens=256)


def peak(method: str) -> int:
    step = METHODS[method](Case(SHAPE, torch.float32))
    step()  # the optimizer makes its state
    return peak_bytes(step)


def test_the_ledger_counts_what_is_held_at_once() -> None:
    def step() -> None:
        first = torch.zeros(256)
        second = first + 1
        del first
        third = second * 2
        third[0] = 1.0

    assert peak_bytes(step) == 2 * 1024


def test_r_max_costs_no_memory_in_the_pooled_layout() -> None:
    peaks = {peak_bytes_of(r_max) for r_max in (16, 64)}
    assert len(peaks) == 1


def peak_bytes_of(r_max: int) -> int:
    step = drlora(r_max=r_max, growing=False)(Case(SHAPE, torch.float32))
    step()
    return peak_bytes(step)


def test_a_step_holds_no_more_than_the_frozen_block_and_the_gradients_of_the_lora() -> None:
    frozen = min(peak(FROZEN), peak(EAGER))
    slots = SHAPE.experts * 16
    features = SHAPE.hidden + 2 * SHAPE.intermediate + SHAPE.intermediate + SHAPE.hidden
    gradients = 4 * slots * features
    assert peak(STATIC) <= frozen + gradients
    assert peak(PEFT) > frozen + gradients  # the ledger does see a full delta per expert
