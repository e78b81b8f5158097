"""Parts of a run that whole runs reach seldom."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import drlora_torch
from drlora_torch.errors import CheckpointError, RunError
from drlora_torch.finetune import job, result, starting, training
from drlora_torch.finetune.after import evaluation
from drlora_torch.finetune.recipe import combine
from drlora_torch.finetune.watch.stopping import StopOnSignal
from tests.torch import helpers, models


def of_run(output: Path, **fields: Any) -> tuple[job.Job, io.StringIO]:
    text = io.StringIO()
    values: dict[str, Any] = dict.fromkeys(job.Job._fields)
    made = {**values, "recipe": combine(fields), "output": output, "console": Console(file=text)}
    return job.Job(**made), text


def test_the_command_to_go_on_has_the_processes(tmp_path: Path) -> None:
    made, _ = of_run(tmp_path / "a run", processes=2, fsdp_size=2)
    path = f"'{tmp_path}/a run'"
    assert made.go_on == f"drlora finetune --resume {path} --processes 2 --fsdp-size=2"


def test_a_report_that_fails_costs_the_page_alone(tmp_path: Path) -> None:
    made, text = of_run(tmp_path)
    assert job._write_page(made) is None
    assert text.getvalue() == ""
    (tmp_path / "recording").mkdir()
    assert job._write_page(made) is None
    said = " ".join(text.getvalue().split())
    assert said.startswith("no report was written: ")
    assert "To try again: drlora report" in said


def test_signals_are_left_alone_in_other_threads() -> None:
    entered = []

    def listen() -> None:
        with StopOnSignal(1, torch.device("cpu")).listening():
            entered.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert entered == [True]


def test_reporters_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    training.check_reporters(None)
    with pytest.raises(RunError, match="no such reporter; did you mean 'wandb'"):
        training.check_reporters(["wandbb"])

    def fail(names: list[str]) -> Any:
        raise RuntimeError("log in\nfirst")

    monkeypatch.setattr(training, "get_reporting_integration_callbacks", fail)
    with pytest.raises(RunError, match="--report-to wandb cannot be used: log in first"):
        training.check_reporters(["wandb"])


def options_with(adapter: Path) -> Any:
    named = {"model": "some/model", "data": "data.jsonl", "steps": 40}
    return combine({**named, "adapter": str(adapter), "r_target": 4, "r_max": 8}).options


def test_a_run_starts_from_an_adapter_of_either_kind(tmp_path: Path) -> None:
    adapter = helpers.attach(models.build())
    helpers.fill(adapter)
    own, of_peft = tmp_path / "own", tmp_path / "peft"
    adapter.save_pretrained(own)
    adapter.export_peft(of_peft)
    loaded = starting.start(models.build(), options_with(own))
    for name, ranks in adapter.ranks().items():
        assert loaded.ranks()[name].tolist() == ranks.tolist()
    taken = starting.start(models.build(), options_with(of_peft))
    assert any(bool(parameter.any()) for parameter in taken.lora_parameters())
    with pytest.raises(RunError, match=r"no adapter of drlora .* nor of PEFT .* is there"):
        starting.start(models.build(), options_with(tmp_path))


def test_a_damaged_adapter_of_peft_leaves_the_model(tmp_path: Path) -> None:
    helpers.attach(models.build()).export_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    model = models.build()
    with pytest.raises(CheckpointError, match="is damaged"):
        starting.start(model, options_with(tmp_path))
    assert drlora_torch.adapters(model) == {}


def test_tasks_get_no_chat_template_where_the_form_of_prompts_is_unknown(tmp_path: Path) -> None:
    text = io.StringIO()
    wanted: Any = type("Wanted", (), {"tasks": ("arc_easy",)})
    assert evaluation._chat(tmp_path, None, wanted, Console(file=text)) is False
    assert "tasks get no chat template" in " ".join(text.getvalue().split())


def test_the_tables_show_skipped_steps_and_many_experts() -> None:
    made = result.RunResult(
        method="greedy", loss_before=3.0, loss_after=2.0, tokens_per_second=None, seconds=1.0,
        peak_memory_mb=None, memory_source="process", budget=200, total_rank=200, skipped_steps=3,
        ranks={"layers.0": [1, 3] * 50}, files=[],
    )  # fmt: skip
    text = io.StringIO()
    console = Console(file=text, width=120)
    result.show(console, [made], Path("run"), None)
    assert "steps without statistics" in text.getvalue()
    assert "100 experts" in text.getvalue()
