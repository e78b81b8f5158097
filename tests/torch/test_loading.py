"""What loading gives besides the saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import drlora_torch
from drlora_core import AllocationRequest
from drlora_core.policies import GROWTH_POLICIES
from tests.torch import helpers, models
from tests.torch.test_checkpoint import FILE, trained


def test_the_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    trained(0).save_pretrained(tmp_path)
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert (tmp_path / FILE).stat().st_mode == ordinary.stat().st_mode


def test_a_policy_of_the_users_goes_on_after_loading(tmp_path: Path) -> None:
    called = []

    def policy(request: AllocationRequest) -> Any:
        called.append(request.step)
        return GROWTH_POLICIES["greedy"](request)

    trained(0).save_pretrained(tmp_path)
    model = models.build()
    adapter = drlora_torch.load(model, tmp_path, policy=policy)
    optimizer = helpers.adamw(adapter)
    while not adapter.events:
        helpers.step(model, optimizer, adapter.engine.step_count)
    assert set(called) == {adapter.events[0].step}
