"""Every way to spread a model over processes, against one process with the whole batch."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers.distributed")

from benchmarks.parity.compare import EXACT, Difference, compare, compare_files
from benchmarks.parity.modes import MODES
from tests.torch import launches

STEPS = 12
pytestmark = launches.MARKS


def describe(found: list[Difference]) -> list[str]:
    """Those that do not agree."""
    return [
        f"{MODES[each.mode].group}: {MODES[each.mode].name}: {each}"
        for each in found
        if not each.agrees
    ]


def test_two_processes_decide_as_one() -> None:
    chosen = [mode for mode in MODES if mode.fast]
    found = compare(2, chosen, STEPS)
    assert describe(found) == []
    assert len(found) == len(chosen)
    assert all(each.events == 4 for each in found)


@pytest.mark.parametrize(
    "world",
    [3, *(pytest.param(world, marks=pytest.mark.exhaustive) for world in (2, 4, 5))],
)
def test_other_modes_and_numbers_of_processes(world: int) -> None:
    chosen = [m for m in MODES if world in m.worlds and not (m.fast and world == 2)]
    assert describe(compare(world, chosen, STEPS)) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("checkpoints", [False, True])
def test_what_is_saved_in_one_topology_goes_on_in_each_other(checkpoints: bool) -> None:
    passages = compare_files(checkpoints)
    assert len(passages) == 36 + (7 if checkpoints else 0)
    assert [each for each in passages if not each.equal_ranks or each.parameters > EXACT] == []
