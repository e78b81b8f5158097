"""The programs of docs/distributed.md run as printed, in as many processes as they name."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from torch.multiprocessing import start_processes

from tests.docs import fragments, pages, processes
from tests.torch import models
from tests.torch.launches import launches

REASON = "tests/docs/test_processes.py runs it in eight processes"


@launches
def test_the_programs_of_the_page_train_in_eight_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(processes.programs()) == pages.read("docs/distributed.md").count(REASON) == 2
    models.build(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(pages.ROOT))
    multiprocessing.set_forkserver_preload([processes.__name__])  # torch is imported once
    start_processes(
        processes.worker, (str(tmp_path),), processes.PROCESSES, start_method="forkserver"
    )
    first, *others = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes.PROCESSES)
    )
    assert all(other == first for other in others)
    for said in first:
        assert said["sharded"]
        assert said["skipped"] == 0
        for ranks in said["ranks"].values():
            assert sum(ranks) == fragments.CONFIG.r_target * len(ranks)
            assert len(set(ranks)) > 1
