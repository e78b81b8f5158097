"""Every example that trains runs as it is: no step is skipped, the budget is met, the loss falls.

tests/test_examples_core.py has 03, which needs no torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


class Expected(NamedTuple):
    """What a run of an example has to show."""

    layers: int
    fall: float  # the last loss over the first one, at most
    says: str = ""  # a regular expression
    launcher: tuple[str, ...] = ()


EXPECTED = {
    "01_custom_loop.py": Expected(2, 0.5),
    "02_trainer.py": Expected(4, 0.7),
    "04_torchrun.py": Expected(2, 0.5, launcher=TORCHRUN),
    "05_export_to_peft.py": Expected(
        4, 0.5, r"served with PEFT alone: 12\+34=[\s\S]*logits: (0\.0e\+00|\S+e-0[5-9])"
    ),
    "06_handwritten_moe.py": Expected(2, 0.1),
    "07_four_bit_base.py": Expected(4, 0.5, r"bytes in NF4[\s\S]*after loading: 0\.0e\+00"),
    "08_dpo.py": Expected(4, 0.2, r"step  20 .* preferred 100%"),
}


def run(name: str, launcher: tuple[str, ...], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *launcher, str(EXAMPLES / name)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_in(printed: str) -> list[float]:
    """Losses as an example prints them, or as the Trainer logs them."""
    found = re.findall(r"^step +\d+  loss (\S+)", printed, flags=re.M)
    found = found or re.findall(r"\{'loss': '?([\d.]+)", printed)
    return [float(loss) for loss in found]


# CI leaves out what tests/test_readme.py and tests/docs/test_processes.py do in another form.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name[:2] in ("01", "04") else [])
        for name in EXPECTED
    ],
)
def test_an_example_trains_and_meets_its_budget(name: str, tmp_path: Path) -> None:
    layers, fall, says, launcher = EXPECTED[name]
    if launcher and not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    if name.startswith("07"):
        pytest.importorskip("bitsandbytes")
    printed = run(name, launcher, tmp_path)
    losses = losses_in(printed)
    assert len(losses) >= 3
    assert losses[-1] <= fall * losses[0]
    ranks = [
        [int(rank) for rank in layer.split(",")]
        for layer in re.findall(r"^\S+ \[([\d, ]+)\]$", printed, flags=re.M)
    ]
    assert len(ranks) == layers
    for layer in ranks:
        assert sum(layer) == 4 * len(layer)
        assert len(set(layer)) > 1
    assert re.findall(r"^skipped steps: (\d+)$", printed, flags=re.M) == ["0"]
    assert re.search(says, printed)


def test_every_example_is_run_and_is_short() -> None:
    programs = {path.name: path for path in EXAMPLES.glob("*.py")}
    assert set(programs) == {*EXPECTED, "03_policy_offline.py"}
    for path in programs.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 100


def test_the_page_of_examples_names_each() -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        assert f"../examples/{path.name}" in page or path.name.startswith(("__", ".")), path.name
