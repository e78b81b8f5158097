"""A merged model is compared with the adapted one where both fit into memory; else it says so."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from drlora_torch.adapter import state_of
from drlora_torch.merge import comparison
from tests.torch import helpers, models


def test_files_larger_than_the_free_memory_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3000))
    monkeypatch.setattr(comparison, "_free_memory", lambda: 2000.0)
    attached = state_of(helpers.attach(models.build()))
    found = comparison._obstacle(attached.model, tmp_path)
    assert found == "0.0 GB do not fit into memory beside this one"


@pytest.mark.parametrize("at", ["probe", "reload"])
def test_memory_that_runs_out_is_a_reason(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(comparison.checkpoints, at, fail)
    attached = state_of(helpers.attach(models.build()))
    with pytest.raises(comparison._NotRunError, match="does not fit into memory"):
        comparison._run(attached, tmp_path)


def test_the_limit_of_a_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"memory.max": "5000\n", "memory.current": "2000\n"}

    def read(path: Path) -> str:
        if path.name not in texts:
            raise FileNotFoundError
        return texts[path.name]

    monkeypatch.setattr(comparison.Path, "read_text", read)
    assert comparison._free_memory() == 3000.0
    texts["memory.max"] = "max\n"
    assert comparison._free_memory() == pytest.approx(comparison._of_machine(), rel=0.5)


def test_without_linux_the_free_pages_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", fail)
    monkeypatch.setattr(comparison.os, "sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.get)
    assert comparison._of_machine() == 7 * 4096
    monkeypatch.setattr(comparison.os, "sysconf", lambda name: -1)
    assert comparison._of_machine() == math.inf


def test_how_far_the_written_logits_have_gone() -> None:
    base, adapted = torch.zeros(4), torch.ones(4)
    assert comparison._share(base, adapted, torch.full((4,), 0.25)) == pytest.approx(0.25)
