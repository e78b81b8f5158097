"""Checkpoints that a disk or a copy has damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from drlora_torch.finetune import folder, job
from drlora_torch.finetune.watch import stopping
from tests.finetune.test_finetune import losses, options_for
from tests.finetune.test_watch import QUIET, signal_at

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from the one before it, and ends as one that was not stopped."""
    straight = tmp_path / "straight"
    options = options_for(moe_folder, sums, steps=6, save_every=2)
    job.run(options, straight, QUIET)
    run = tmp_path / "run"
    signal_at(monkeypatch, 5)
    with pytest.raises(stopping.Stopped):
        job.run(options, run, QUIET)
    monkeypatch.undo()
    last = run / "checkpoints" / "checkpoint-5"
    state = bytearray((last / "optimizer.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(state)
    with pytest.warns(RuntimeWarning, match="optimizer.pt has changed since it was written"):
        job.run(folder.read(run), run, QUIET, resume=True)
    assert losses(run) == losses(straight)
    name = f"{folder.ADAPTER}/drlora_adapter.safetensors"
    assert (run / name).read_bytes() == (straight / name).read_bytes()
