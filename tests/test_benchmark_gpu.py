"""``benchmarks/gpu.py`` without a GPU, at tiny sizes: all parts run, and a wrong result is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_device import decisions, parity, waiting
from benchmarks.on_device.shapes import SHAPES, Case


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on what it compiles
def test_all_parts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert text in capsys.readouterr().out
    assert text.splitlines()[2].startswith("No GPU has run this page.")
    for part in ("Parity", "Waiting", "Steps", "Decisions", "Compiled and checkpointed", "Goals"):
        assert f"\n## {part}\n" in text
    assert "failed" not in text
    assert text.count("| OLMoE | 64 |") >= 5


def test_a_wrong_result_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = parity.Difference("a kernel", 0.5, "output", 0.01)
    monkeypatch.setattr(parity, "compare", lambda device, tiny: iter([wrong]))
    monkeypatch.setattr(waiting, "of_model", lambda *given: (["drlora_torch/x.py:1"], []))
    monkeypatch.setattr(waiting, "of_blocks", lambda *given: ([], []))
    arguments = ["--device", "cpu", "--tiny", "--parts", "parity", "waiting"]
    assert gpu.main([*arguments, "--output", str(tmp_path)]) == 1
    text = next(tmp_path.iterdir()).read_text()
    assert "| a kernel | 5.0e-01 | output | 1.0e-02 | NO |" in text
    assert "| a whole model | x.py:1 | none |" in text


def test_a_part_that_fails_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(parity, "compare", lambda device, tiny: iter([]))
    monkeypatch.setattr(gpu.event, "milliseconds", fail)
    arguments = ["--device", "cpu", "--tiny", "--parts", "parity", "event"]
    assert gpu.main([*arguments, "--output", str(tmp_path)]) == 1
    text = next(tmp_path.iterdir()).read_text()
    assert "## Parity" in text
    assert "## event: failed" in text
    assert "out of memory" in text


def test_without_a_gpu_the_command_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_decisions_differ_from_the_first_event_that_differs() -> None:
    first = decisions.Run([], [{"a": [1, 0]}, {"a": [0, 1]}, {"a": [1, 1]}])
    second = decisions.Run([], [{"a": [1, 0]}, {"a": [1, 0]}, {"a": [1, 1]}])
    assert decisions.count_equal(first, second) == (1, 3)
    assert decisions.count_equal(first, first) == (3, 3)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models(name: str) -> None:
    """The experts of a block have the sizes that its shape says."""
    shape = SHAPES[name].tiny()
    case = Case(shape, 4, 1, torch.device("cpu"), torch.float32)
    weights = [p for p in case.blocks().parameters() if p.dim() == 3]
    assert sum(p.numel() for p in weights) == 3 * shape.experts * shape.hidden * shape.intermediate
