"""The main job: what it trains, writes, resumes, and leaves alone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

import drlora_torch
from drlora_core import AllocatorConfig
from drlora_core.recording import Recording
from drlora_core.replay import replay
from drlora_torch.finetune import job, result
from drlora_torch.finetune.model import load_model
from drlora_torch.finetune.recipe import Recipe
from drlora_torch.finetune.watch.progress import RichProgress
from tests.marks import slow_but

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


def options_for(model: Path, data: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 2e-2,
        "r_init": 1,
        "r_target": 2,
        "r_max": 6,
        "save_every": 4,
    }
    return Recipe(**{**values, **changes})


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def training_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in training_rows(folder)}


class Killed(BaseException):
    pass


def kill(monkeypatch: pytest.MonkeyPatch, step: int, options: Recipe, folder: Path) -> None:
    """Start a run that dies after a step."""

    def die(self: RichProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RichProgress, "on_step_end", die, raising=False)
        with pytest.raises(Killed):
            job.run(options, folder, Console(quiet=True))


def test_it_learns_and_meets_the_budget_with_unequal_ranks(
    moe_folder: Path, sums: Path, tmp_path: Path, console: Console
) -> None:
    output = tmp_path / "run"
    (result,) = job.run(options_for(moe_folder, sums), output, console)
    assert result.loss_after < result.loss_before
    assert result.total_rank == result.budget == 2 * 8 * 2
    assert len({rank for ranks in result.ranks.values() for rank in ranks}) > 1
    assert all(sum(ranks) == 16 for ranks in result.ranks.values())
    saved = json.loads((output / "result.json").read_text())
    assert saved == [result.model_dump()]
    adapter = drlora_torch.load(load_model(str(moe_folder)), output / "adapter")
    assert {name: ranks.tolist() for name, ranks in adapter.ranks().items()} == result.ranks
    assert adapter.engine.step_count == 12
    replayed = replay(Recording.open(output / "recording"))
    assert {name: ranks.tolist() for name, ranks in replayed.final_ranks.items()} == result.ranks


@pytest.mark.slow
def test_compare_trains_static_lora_at_the_same_budget_from_the_same_base(
    moe_folder: Path, sums: Path, tmp_path: Path, console: Console
) -> None:
    recipe = options_for(moe_folder, sums, compare="uniform")
    ours, uniform = job.run(recipe, tmp_path / "run", console)
    assert uniform.method == "uniform"
    assert uniform.budget == ours.budget == uniform.total_rank
    assert {rank for ranks in uniform.ranks.values() for rank in ranks} == {2}
    assert uniform.loss_before == ours.loss_before  # the first run left no trace in the model


@pytest.mark.parametrize(("router", "weight"), [("frozen", 0.0), ("after_warmup", 0.125)])
def test_a_trained_router_keeps_the_balancing_loss_of_the_model(
    router: str,
    weight: float,
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = shutil.copytree(moe_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "router_aux_loss_coef": 0.125}))
    weights = []

    def note(trainer: Any, *_: Any) -> None:
        config = trainer.model.config
        weights.append(config.router_aux_loss_coef if config.output_router_logits else 0.0)

    monkeypatch.setattr(job, "train", note)
    job.run(options_for(base, sums, router=router), tmp_path / "run", console)
    assert weights == [weight]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", slow_but([{}, {"router": "after_warmup", "dropout": 0.2}], [{}])
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    changes: dict[str, Any],
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_for(moe_folder, sums, **changes)
    (whole,) = job.run(options, tmp_path / "whole", console)

    kill(monkeypatch, 7, options, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "adapter").exists()
    (resumed,) = job.run(options, tmp_path / "stopped", console, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert resumed.ranks == whole.ranks
    assert resumed.loss_after == whole.loss_after
    recorded = Recording.open(tmp_path / "stopped" / "recording")
    assert recorded.steps == 12


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_for(moe_folder, sums, steps=4, save_every=4)
    (whole,) = job.run(options, tmp_path / "whole", console)
    stopped = tmp_path / "stopped"
    kill(monkeypatch, 3, options, stopped)
    assert list((stopped / "recording").iterdir())
    (again,) = job.run(options, stopped, console, resume=True)
    assert losses(stopped) == losses(tmp_path / "whole")
    assert again.ranks == whole.ranks
    assert Recording.open(stopped / "recording").steps == 4


@pytest.mark.slow
def test_speed_after_a_resume_is_that_of_the_process_that_finished(
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    options = options_for(moe_folder, sums)
    kill(monkeypatch, 10, options, output)
    (resumed,) = job.run(options, output, console, resume=True)  # steps 9 to 12
    seen = {row["step"]: row["num_input_tokens_seen"] for row in training_rows(output)}
    assert resumed.tokens_per_second is not None
    tokens = resumed.tokens_per_second * resumed.seconds
    assert tokens == pytest.approx(seen[12] - seen[8], rel=1e-9)
    assert 0 < seen[12] - seen[8] < seen[8]


@pytest.mark.slow
def test_a_finished_training_is_not_trained_further(
    moe_folder: Path, sums: Path, tmp_path: Path, console: Console
) -> None:
    """As when a run stops in the second of its two methods and is resumed."""
    output = tmp_path / "run"
    options = options_for(moe_folder, sums, steps=4)
    (first,) = job.run(options, output, console)
    before = (output / "adapter" / "drlora_adapter.safetensors").read_bytes()
    rows = training_rows(output)
    (again,) = job.run(options, output, console, resume=True)
    assert training_rows(output) == rows
    assert (output / "adapter" / "drlora_adapter.safetensors").read_bytes() == before
    assert Recording.open(output / "recording").steps == 4
    assert again.loss_after == first.loss_after
    assert again.ranks == first.ranks
    assert again.tokens_per_second is again.peak_memory_mb is None
    shown = Console(record=True, file=io.StringIO(), width=120)
    result.show(shown, [first, again.model_copy(update={"method": "uniform"})], output, None)
    for label in ("tokens per second", "peak memory in MiB, "):
        (row,) = [line for line in shown.export_text(clear=False).splitlines() if label in line]
        assert row.split("│")[2].strip() != "-"
        assert row.split("│")[3].strip() == "-"


@pytest.mark.slow
def test_peak_memory_is_that_of_the_training_alone(
    moe_folder: Path, sums: Path, tmp_path: Path, console: Console
) -> None:
    earlier = np.ones(2**25)  # 256 MiB
    high = psutil.Process().memory_info().rss / 2**20
    del earlier
    (trained,) = job.run(options_for(moe_folder, sums, steps=4), tmp_path / "run", console)
    assert trained.peak_memory_mb is not None
    assert 0 < trained.peak_memory_mb < high - 128


@pytest.mark.slow
def test_the_bar_shows_loss_and_rank_on_a_terminal(
    moe_folder: Path, sums: Path, tmp_path: Path
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    (trained,) = job.run(options_for(moe_folder, sums, steps=4), tmp_path / "run", terminal)
    last = training_rows(tmp_path / "run")[-1]
    assert trained.total_rank == 32
    assert f"loss {last['loss']:.4f}  rank 32" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()


@pytest.mark.slow
def test_a_failing_write_leaves_the_last_checkpoint(
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    real = torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(args[1]):
            raise RuntimeError("PytorchStreamWriter failed writing file: no space left")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    output = tmp_path / "run"
    with pytest.raises(drlora_torch.CheckpointError, match="no space left"):
        job.run(options_for(moe_folder, sums), output, console)
    monkeypatch.undo()
    (result,) = job.run(options_for(moe_folder, sums), output, console, resume=True)
    assert result.total_rank == result.budget


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"steps": 200}, AllocatorConfig(warmup_steps=10, growth_interval=5, growth_end=50)),
        ({"steps": 4}, AllocatorConfig(warmup_steps=0, growth_interval=1, growth_end=1)),
        (
            {"steps": 1, "growth_end": 1},
            AllocatorConfig(warmup_steps=0, growth_interval=1, growth_end=1),
        ),
    ],
)
def test_the_default_window_ends_before_the_training_does(
    changes: dict[str, Any], window: AllocatorConfig
) -> None:
    options = Recipe(model="m", data="d.jsonl", **changes).options
    config = options.allocator_config()
    assert config.growth_steps == window.growth_steps
    assert config.growth_steps[-1] <= (options.steps or 0)
    # an expert that wins every event gets to r_max, and the last event makes it possible
    assert config.max_growth is not None
    assert config.r_init + config.num_events * config.max_growth >= config.r_max


def test_checkpoints_hold_the_adapter_and_not_the_model(
    moe_folder: Path, sums: Path, tmp_path: Path, console: Console
) -> None:
    output = tmp_path / "run"
    job.run(options_for(moe_folder, sums, steps=4), output, console)
    names = {path.name for path in (output / "checkpoints").rglob("*") if path.is_file()}
    assert "drlora_adapter.safetensors" in names
    assert "model.safetensors" not in names
