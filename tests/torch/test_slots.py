"""Slot tables against plain lists: any history of growth and cuts, in both layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drlora_torch.lora.slots import FREE, Layout, SlotTable

R_MAX = 4


@st.composite
def histories(draw: Any) -> tuple[int, list[tuple[str, Any]]]:
    """Draw a number of experts and operations: growth per expert, or marks of what to cut."""
    experts = draw(st.integers(1, 5))
    grow = st.lists(st.integers(0, R_MAX), min_size=experts, max_size=experts)
    cut = st.lists(
        st.lists(st.booleans(), min_size=R_MAX, max_size=R_MAX), min_size=experts, max_size=experts
    )
    step = st.one_of(st.tuples(st.just("grow"), grow), st.tuples(st.just("cut"), cut))
    return experts, draw(st.lists(step, max_size=8))


def check(table: SlotTable, content: list[list[int]], values: np.ndarray) -> None:
    """Compare with ``content``: for each expert the labels of its dimensions, in order."""
    assert table.ranks().tolist() == [len(labels) for labels in content]
    active = table.active()
    assert values[active].tolist() == [label for labels in content for label in labels]
    assert table.owner[active].tolist() == [e for e, labels in enumerate(content) for _ in labels]
    assert (
        sorted(set(range(table.num_slots)) - set(active.tolist()))
        == np.flatnonzero(table.owner == FREE).tolist()
    )
    assert ((table.owner == FREE) == (table.position == FREE)).all()
    matrix = table.per_dimension(values.astype(np.float64))
    assert matrix.shape == (len(content), R_MAX)
    for row, labels in zip(matrix.tolist(), content, strict=True):
        assert row == [*labels, *[0] * (R_MAX - len(labels))]


@given(histories())
def test_pooled(history: tuple[int, list[tuple[str, Any]]]) -> None:
    run(Layout.POOLED, history, num_slots=3 * history[0])


@given(histories())
def test_masked(history: tuple[int, list[tuple[str, Any]]]) -> None:
    """Growth, then cuts: a run never grows again after pruning."""
    experts, steps = history
    steps = sorted(steps, key=lambda step: step[0] == "cut")
    table = run(Layout.MASKED, (experts, steps), num_slots=R_MAX * experts)
    held = np.flatnonzero(table.owner != FREE)
    assert (held // R_MAX == table.owner[held]).all()


def run(layout: Layout, history: tuple[int, list[tuple[str, Any]]], *, num_slots: int) -> SlotTable:
    experts, steps = history
    table = SlotTable(num_slots, experts, R_MAX, layout)
    content: list[list[int]] = [[] for _ in range(experts)]
    values = np.zeros(num_slots, dtype=np.int64)  # the label written into each slot at its birth
    label = 0
    for kind, what in steps:
        if kind == "grow":
            growth = within_limits(what, content, num_slots)
            before = table.owner.copy()
            born = table.grow(np.array(growth))
            assert (before[born.slots] == FREE).all()
            for slot, expert, position in zip(*(part.tolist() for part in born), strict=True):
                label += 1
                assert position == len(content[expert])
                content[expert].append(label)
                values[slot] = label
        else:
            marks = np.array(what) & (
                np.arange(R_MAX) < np.array([[len(labels)] for labels in content])
            )
            freed = table.cut(marks)
            gone = [
                labels[j]
                for labels, row in zip(content, marks.tolist(), strict=True)
                for j in range(len(labels))
                if row[j]
            ]
            assert sorted(values[freed].tolist()) == sorted(gone)
            content = [
                [label for label, mark in zip(labels, row, strict=False) if not mark]
                for labels, row in zip(content, marks.tolist(), strict=True)
            ]
        check(table, content, values)
    return table


def within_limits(growth: list[int], content: list[list[int]], num_slots: int) -> list[int]:
    """Lower a growth until neither r_max nor the slots are exceeded."""
    room = num_slots - sum(map(len, content))
    lowered = []
    for wanted, labels in zip(growth, content, strict=True):
        lowered.append(min(wanted, R_MAX - len(labels), room))
        room -= lowered[-1]
    return lowered
