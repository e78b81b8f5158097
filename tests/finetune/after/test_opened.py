"""Runs, finished and not, are found in their folders."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

import drlora_torch
from drlora_torch.finetune import folder
from drlora_torch.finetune.after.found import adapter_of, trained_columns
from drlora_torch.finetune.after.opened import open_run
from drlora_torch.finetune.model import load_model
from drlora_torch.finetune.next_steps import next_steps
from drlora_torch.storage import run_folder
from tests.finetune.after.conftest import Call

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_storage_knows_the_folder_of_a_run() -> None:
    assert run_folder.RUN_ADAPTER == folder.ADAPTER
    assert run_folder.RUN_CHECKPOINTS == folder.CHECKPOINTS
    assert (run_folder.RUN_RECIPE, run_folder.RUN_RESULT) == (folder.RECIPE, folder.RESULT)


def test_load_takes_the_folder_of_a_run(run: Path, moe_folder: Path) -> None:
    adapter = drlora_torch.load(load_model(str(moe_folder)), run)
    (result,) = json.loads((run / "result.json").read_text())
    assert {name: ranks.tolist() for name, ranks in adapter.ranks().items()} == result["ranks"]


def test_load_names_the_checkpoint_of_an_unfinished_run(
    unfinished: Path, moe_folder: Path, tmp_path: Path
) -> None:
    model = load_model(str(moe_folder))
    last = unfinished / "checkpoints" / "checkpoint-4"
    with pytest.raises(drlora_torch.CheckpointError) as refused:
        drlora_torch.load(model, unfinished)
    assert f"its last checkpoint is {last}; finish it with: " in str(refused.value)
    assert str(refused.value).endswith(f"drlora finetune --resume {unfinished}")
    young = tmp_path / "my run"
    (young / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(drlora_torch.CheckpointError, match=r"no checkpoint yet; .* '.*my run'$"):
        drlora_torch.load(model, young)
    assert drlora_torch.load(model, last).engine.step_count == 4


def test_every_command_takes_the_last_checkpoint_of_an_unfinished_run(
    unfinished: Path, call: Call, tmp_path: Path
) -> None:
    assert open_run(unfinished).adapter.engine.step_count == 4
    assert not open_run(unfinished).adapter.parameters()[0].requires_grad
    for words in (
        ["generate", unfinished, "1+1=", "--max-new-tokens", 2],
        ["evaluate", unfinished],
        ["merge", unfinished, "--output", tmp_path / "merged"],
        ["export", unfinished, "--output", tmp_path / "peft"],
    ):
        said = call(*words)
        assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("finished", "later", "taken"),
    [(True, True, "adapter"), (False, True, "checkpoints/checkpoint-8"), (False, False, "adapter")],
)
def test_a_run_that_goes_on_is_not_taken_from_its_old_adapter(
    finished: bool, later: bool, taken: str, run: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(run, tmp_path / "run")
    if not finished:
        (mine / folder.RESULT).unlink()
    if later:  # the adapter is that of an earlier end
        name = "drlora_adapter.safetensors"
        shutil.copy(mine / folder.CHECKPOINTS / "checkpoint-4" / name, mine / folder.ADAPTER / name)
    assert adapter_of(mine) == mine / taken
    if taken == "adapter":
        assert run_folder.adapter_in(mine) == mine / taken
        return
    with pytest.raises(drlora_torch.CheckpointError, match=r"its last checkpoint is .*point-8;"):
        run_folder.adapter_in(mine)


def test_the_static_lora_of_a_comparison_is_a_run_too(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run" / "uniform")
    (tmp_path / "run" / "uniform" / "run.yaml").rename(tmp_path / "run" / "run.yaml")
    (tmp_path / "run" / "uniform" / "data.json").rename(tmp_path / "run" / "data.json")
    uniform = tmp_path / "run" / "uniform"
    assert adapter_of(uniform) == uniform / "adapter"
    assert trained_columns(uniform) == "prompt"
    assert open_run(uniform).adapter.engine.step_count == 8


def test_next_steps_are_commands_that_work(run: Path, call: Call, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "my run")
    lines = next_steps(copy).splitlines()[1:-1]
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "drlora"
        said = call(*words)
        assert said.code == 0, said.err
    assert len(lines) == 5


def test_a_run_without_recording_has_no_report_to_come(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "recording")
    assert "drlora report" in next_steps(run)
    assert "drlora report" not in next_steps(copy)
