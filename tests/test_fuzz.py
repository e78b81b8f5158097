"""The fuzzer: no reader falls over a few damaged files, and one that does is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from scripts.fuzz import attempts as fuzz
from scripts.fuzz import targets
from tests.marks import slow_but

SLOW = {"report", "checkpoints", "going-on"}  # they draw pages and train
QUIET = Console(quiet=True)


@pytest.mark.parametrize("name", slow_but(fuzz.ALL, fuzz.ALL.keys() - SLOW))
def test_readers_refuse_damage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz.fuzz_plainly(name, fuzz.ALL[name].share_of(20), 1, QUIET) == 0


def test_readers_that_fall_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> None:
        text = (folder / "allocator.json").read_text(errors="replace")
        if "r_max" not in text:
            raise KeyError("r_max")
        float("r_target" if "r_target" not in text else 1)

    monkeypatch.chdir(tmp_path)
    broken = targets.Target(targets.write_settings, read, ("allocator.json",))
    monkeypatch.setitem(fuzz.ALL, "broken", broken)
    assert fuzz.fuzz_plainly("broken", 300, 0, QUIET) == 2
    kept = list(tmp_path.glob("fuzz-findings/broken-*/allocator.json"))
    assert len(kept) == 2
