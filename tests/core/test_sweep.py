"""A sweep gives the replays that one by one would be given, in one process and in several."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from drlora_core import AllocatorConfig, DRLoRAError, LayoutError, StatisticError
from drlora_core.recording import Recording
from drlora_core.replay import first_difference, replay
from drlora_core.sweep import sweep
from tests.core import recorded


@pytest.fixture(scope="module")
def recording() -> Recording:
    rng = np.random.default_rng(3)
    routing = {"a": rng.random((20, 6)), "b": rng.random((20, 4))}
    importance = {"a": rng.random((20, 6)), "b": rng.random((20, 4))}
    return Recording.from_arrays(routing, importance)


def configs() -> dict[str, AllocatorConfig]:
    return {
        name: recorded.config(policy=name)
        for name in ("greedy", "rescored", "proportional", "uniform", "random")
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_is_replays_in_order(recording: Recording, processes: int) -> None:
    result = sweep(recording, configs(), processes, progress=processes == 2)
    assert list(result.replays) == list(configs())
    for name, config in configs().items():
        expected = replay(recording, config)
        assert first_difference(expected.events, result.replays[name].events) is None
    table = result.rows()
    assert [row["mean_rank"] for row in table] == [4.0] * 5
    assert table[0]["overlap_with_first"] == 1.0
    assert table[3]["gini"] == 0.0
    lines = str(result).splitlines()
    assert lines[0].startswith("configuration")
    assert lines[1].startswith("greedy")
    assert "cannot know how they would have changed" in lines[-1]


def test_a_sequence_is_named_by_number_and_policy(recording: Recording) -> None:
    result = sweep(recording, [recorded.config(), recorded.config(gamma=0.0)])
    assert list(result.replays) == ["1 greedy", "2 greedy"]
    with pytest.raises(LayoutError, match="at least one"):
        sweep(recording, [])


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_names_its_configuration(processes: int) -> None:
    routing = Recording.from_arrays({"a": np.ones((20, 3))})
    both = {"good": recorded.config(use_importance=False), "bad": recorded.config()}
    with pytest.raises(StatisticError, match="configuration 'bad': layer 'a', step 1"):
        sweep(routing, both, processes)


UNGUARDED = """
import numpy as np
from drlora_core.recording import Recording
from drlora_core.sweep import sweep
from tests.core import recorded
config = recorded.config(use_importance=False)
sweep(Recording.from_arrays({"a": np.ones((20, 3))}), [config, config], processes=2)
"""


def test_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": root, "PATH": ""},
        check=False,
    )
    assert result.returncode == 1
    assert DRLoRAError.__name__ in result.stderr
    assert 'if __name__ == "__main__"' in result.stderr


def test_workers_that_end_are_explained(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, processes: int, mp_context: object) -> None:
            super().__init__(processes)

        def submit(self, *_: object) -> concurrent.futures.Future[object]:  # type: ignore[override]
            raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Ended)
    with pytest.raises(DRLoRAError, match=r"worker processes of the sweep ended; .* processes=1"):
        sweep(recording, configs(), processes=2)
