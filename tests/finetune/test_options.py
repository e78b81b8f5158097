"""One declaration of the options: the command line, attach and the allocator follow it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

import drlora_torch
from drlora_core import AllocatorConfig
from drlora_core.cli import main
from drlora_torch.finetune import job
from drlora_torch.finetune.folder import read, write_metrics
from drlora_torch.finetune.options import FinetuneOptions, embedded_defaults
from drlora_torch.options import AdapterOptions

FIELDS = FinetuneOptions.model_fields
# A value of each field that is neither its default nor that of the shipped model.
OTHER: dict[str, Any] = {
    "model": "m",
    "data": "d.jsonl",
    "eval_data": "e.jsonl",
    "eval_fraction": 0.5,
    "steps": 60,
    "batch_size": 3,
    "accumulation": 2,
    "learning_rate": 1e-3,
    "max_length": 7,
    "seed": 5,
    "dtype": "bfloat16",
    "r_init": 3,
    "r_target": 5,
    "r_max": 9,
    "alpha": 2.5,
    "gamma": 0.0,
    "timetable": "late",
    "warmup_steps": 0,
    "growth_interval": 4,
    "growth_end": 40,
    "max_growth": 2,
    "policy": "random",
    "scope": "global",
    "router": "trainable",
    "layout": "masked",
    "dropout": 0.25,
    "load_in_4bit": True,
    "quantization": "nf4",
    "gradient_checkpointing": True,
    "save_every": 11,
}


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FinetuneOptions, str | None]]:
    """What the command line hands to the job."""
    calls: list[tuple[FinetuneOptions, str | None]] = []

    def run(options: FinetuneOptions, *_: Any, compare: str | None, **__: Any) -> None:
        calls.append((options, compare))

    monkeypatch.setattr(job, "run", run)
    return calls


def finetune(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *arguments])
    assert not stopped.value.code


def test_every_field_is_an_option(received: list[Any]) -> None:
    assert set(OTHER) == set(FIELDS)
    arguments = [OTHER["model"], OTHER["data"], "--compare", "uniform"]
    for name, value in OTHER.items():
        if name in {"model", "data"}:
            continue
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    finetune(*arguments)
    ((options, compare),) = received
    assert options == FinetuneOptions(**OTHER)
    assert compare == "uniform"


def test_what_is_not_given_has_the_default(received: list[Any]) -> None:
    finetune("m", "d.jsonl")
    finetune()
    finetune("--r-max", "20")
    shipped = embedded_defaults()
    assert [options for options, _ in received] == [
        FinetuneOptions(model="m", data="d.jsonl"),
        FinetuneOptions.model_validate(shipped),
        FinetuneOptions.model_validate({**shipped, "r_max": 20}),
    ]


def test_the_help_has_default_and_range_of_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    finetune("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert field.description
        described = text.partition(" ".join(field.description.split()))[2]
        assert described, name
        if not field.is_required() and field.default is not None and field.annotation is not bool:
            note = f" [default: {field.default}"
            if name in embedded_defaults():
                note += f", shipped model: {embedded_defaults()[name]}"
            assert described.startswith(note)
    assert "Optimizer steps. [default: 200; at least 1]" in text
    assert "[default: 0.05; above 0 and below 1]" in text


def test_fields_agree_with_the_allocator_and_attach() -> None:
    """A default or bound that is declared in two packages is the same in both."""
    for name, theirs in AllocatorConfig.model_fields.items():
        if name in FIELDS and FIELDS[name].default is not None:
            assert FIELDS[name].default == theirs.default
    parameters = inspect.signature(drlora_torch.attach).parameters
    for name in job.ATTACH_OPTIONS:
        assert FIELDS[name].default == parameters[name].default
        for values in get_args(FIELDS[name].annotation):
            if isinstance(values, str):
                AdapterOptions.model_validate({"alpha": 1.0, name: values})
    assert FIELDS["dropout"].metadata == AdapterOptions.model_fields["dropout"].metadata


def test_infinite_numbers_are_refused() -> None:
    for name in ("learning_rate", "alpha", "gamma"):
        with pytest.raises(ValidationError, match="finite"):
            FinetuneOptions.model_validate({"model": "m", "data": "d", name: float("inf")})


def test_options_without_a_comparison_are_read(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"options": OTHER}))
    saved = read(tmp_path)
    assert saved.options == FinetuneOptions(**OTHER)
    assert saved.compare is None


def test_a_full_disk_leaves_the_old_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    write_metrics(tmp_path, [{"loss": 1.0}])
    real = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        real(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            write_metrics(tmp_path, [{"loss": 1.0}, {"loss": 2.0}])
    assert file.read_text() == '{"loss": 1.0}\n'
    assert list(tmp_path.iterdir()) == [file]
