"""Runs of ``drlora finetune``: what is read to go on with one, or to use what it has trained."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from transformers import TrainerState

from drlora_torch.embedded import MODEL_DIR, TEST_FILE
from drlora_torch.finetune import folder as run_folder
from drlora_torch.finetune import job
from drlora_torch.finetune.after.found import adapter_of, read_options, read_summary
from drlora_torch.finetune.recipe import Recipe
from drlora_torch.finetune.training import read_state
from drlora_torch.finetune.watch.metrics_file import MetricsFile
from drlora_torch.integrations.trainer import last_checkpoint
from drlora_torch.storage import adapter_file
from drlora_torch.storage.run_folder import adapter_in, final_adapter
from drlora_torch.storage.seal import SEAL
from scripts.fuzz.targets import Target, check_finite, each

QUIET = Console(quiet=True)


@functools.cache
def trained() -> Path:
    """A run of four steps with two checkpoints, which has not ended."""
    run = Path(tempfile.mkdtemp(), "run")
    rows = run.parent / "rows.jsonl"
    rows.write_text("".join(TEST_FILE.read_text().splitlines(keepends=True)[:6]))
    recipe = Recipe(
        model=str(MODEL_DIR), data=str(rows), steps=4, batch_size=1, max_length=32, eval_every=2,
        r_init=2, r_target=4, r_max=8, warmup_steps=0, growth_interval=1, growth_end=3, patience=2,
    )  # fmt: skip
    job.run(recipe, run, QUIET)
    (run / run_folder.RESULT).unlink()
    shutil.rmtree(run / run_folder.ADAPTER)
    (run / "report.html").unlink()
    return run


def write_checkpoints(folder: Path) -> None:
    shutil.copytree(trained(), folder / "run")


def read_checkpoints(folder: Path) -> None:
    """Everything that is read of a run before a model is loaded."""
    run = folder / "run"
    each(
        lambda: adapter_in(run),
        lambda: final_adapter(run),
        lambda: adapter_file.read(adapter_of(run)),
        lambda: read_options(run).allocator_config(),
        lambda: read_summary(run),
        lambda: _read_last(run),
        lambda: MetricsFile(run / run_folder.METRICS, TrainerState(global_step=2)),
    )


def _read_last(run: Path) -> None:
    state = read_state(last_checkpoint(run / run_folder.CHECKPOINTS))
    if state is not None:
        assert 0 <= state.global_step <= 10**12
        check_finite([state.epoch or 0.0, state.total_flos])


def write_stopped(folder: Path) -> None:
    """A run that stopped at its second step; its checkpoint has no seal, as those of others."""
    write_checkpoints(folder)
    checkpoints = folder / "run" / run_folder.CHECKPOINTS
    shutil.rmtree(checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-2" / SEAL).unlink()


def read_and_go_on(folder: Path) -> None:
    """Go on with a run, to its end."""
    run = folder / "run"
    recipe = run_folder.read(run)
    if (recipe.model, recipe.steps, recipe.batch_size) != (str(MODEL_DIR), 4, 1):
        return  # another run, which takes its time
    for result in job.run(recipe, run, QUIET, resume=True):
        check_finite([result.loss_before, result.loss_after])


TARGETS = {
    "checkpoints": Target(
        write_checkpoints,
        read_checkpoints,
        (
            "run/run.yaml", "run/data.json", "run/metrics.jsonl",
            "run/checkpoints/*/trainer_state.json", "run/checkpoints/*/drlora_seal.json",
            "run/checkpoints/*/drlora_adapter.safetensors", "run/checkpoints/*/optimizer.pt",
        ),
        share=0.1,
    ),
    "going-on": Target(
        write_stopped,
        read_and_go_on,
        ("run/data.json", "run/metrics.jsonl", "run/checkpoints/*/*.*"),
        share=0.003,
        seconds=20.0,
    ),
}  # fmt: skip
