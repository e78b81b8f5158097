"""One declaration of the options: the command line, attach and the allocator follow it."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
from pydantic import ValidationError

import drlora_torch
from drlora_core import AllocatorConfig
from drlora_core.cli import main
from drlora_torch import signals
from drlora_torch.finetune import job
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.recipe import Recipe, combine, shipped_run
from drlora_torch.finetune.signature import command_line
from drlora_torch.finetune.starting import ATTACH_OPTIONS
from drlora_torch.options import AdapterOptions

FIELDS = Recipe.model_fields
# A value of each field that is neither its default nor that of the shipped model.
OTHER: dict[str, Any] = {
    "model": "m",
    "data": "d.jsonl",
    "eval_data": "e.jsonl",
    "eval_fraction": 0.05,  # excluded by eval_data
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
    "move_share": 0.2,  # needs policy move, which needs scope layer
    "r_min": 1,  # likewise
    "scope": "global",
    "router": "trainable",
    "importance": "fisher",
    "routing": "margin",
    "layout": "masked",
    "dropout": 0.25,
    "load_in_4bit": True,
    "quantization": "nf4",
    "gradient_checkpointing": True,
    "save_every": None,  # excluded by patience
    "split": "other",
    "adapter": None,  # excludes compare
    "columns": {"prompt": "ask", "completion": "reply"},
    "chat_template": "t.jinja",
    "train_on": "all",
    "packing": True,
    "streaming": True,
    "attention_rank": 4,
    "attention_alpha": 9.0,
    "attention_targets": ("q_proj", "v_proj"),
    "modules_to_save": ("lm_head",),
    "method": "sft",
    "beta": 0.1,  # needs dpo
    "epochs": None,  # excludes steps
    "lr_scheduler": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "optimizer": "sgd",
    "max_grad_norm": 0.5,
    "eval_every": 11,
    "patience": 2,
    "report_to": ("tensorboard", "wandb"),
    "run_name": "name",
    "fsdp_size": 2,
    "ep_size": 2,
    "tp_size": 1,
    "output": "out",
    "compare": "uniform",
    "processes": 1,
}


def as_words(fields: dict[str, Any]) -> list[str]:
    """Fields as a user writes them; an independent copy of what the library does."""
    words = []
    for name, value in fields.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, dict):
            words.append(f"{option}={','.join(f'{a}={b}' for a, b in value.items())}")
        elif isinstance(value, tuple):
            words.append(f"{option}={','.join(value)}")
        elif value is not None and name not in {"model", "data", "processes"}:
            words.append(f"{option}={value}")
    return words


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What the command line hands to the job."""
    calls: list[Recipe] = []

    def run(recipe: Recipe, *_: Any, **__: Any) -> None:
        calls.append(recipe)

    monkeypatch.setattr(job, "run", run)
    return calls


def finetune(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *arguments])
    assert not stopped.value.code


def test_every_field_is_an_option(received: list[Any]) -> None:
    assert set(OTHER) == set(FIELDS)
    finetune(OTHER["model"], OTHER["data"], *as_words(OTHER), "--processes", "1")
    assert received == [Recipe(**OTHER)]
    assert [received[0].options] == [
        FinetuneOptions.model_validate(
            {name: value for name, value in OTHER.items() if name in FinetuneOptions.model_fields}
        )
    ]
    own = {name: value for name, value in OTHER.items() if name not in {"model", "data"}}
    words = command_line(own)
    assert sorted(words) == sorted([*as_words(OTHER), "--processes=1"])


def test_what_is_not_given_has_the_default(received: list[Any]) -> None:
    finetune("m", "d.jsonl")
    finetune()
    finetune("--r-max", "20")
    shipped = shipped_run()
    assert received == [
        Recipe(model="m", data="d.jsonl"),
        Recipe.model_validate(shipped),
        Recipe.model_validate({**shipped, "r_max": 20}),
    ]


def test_the_help_has_default_and_range_of_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    finetune("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert field.description
        words = " ".join(field.description.split())
        described = text.replace("- ", "-").partition(words.replace("- ", "-"))[2]
        assert described, name
        if not field.is_required() and field.default is not None and field.annotation is not bool:
            note = f" [default: {field.default}"
            if name in shipped_run():
                note += f", shipped model: {shipped_run()[name]}"
            assert described.startswith(note)
    assert (
        "Rows per device and forward pass. [default: 16; at least 1 and at most 1,048,576]" in text
    )
    assert "[default: 0.05; above 0 and below 1]" in text


def test_fields_agree_with_the_allocator_and_attach() -> None:
    """A default or bound that is declared in two packages is the same in both."""
    for name, theirs in AllocatorConfig.model_fields.items():
        if name in FIELDS and FIELDS[name].default is not None:
            assert FIELDS[name].default == theirs.default
    parameters = inspect.signature(drlora_torch.attach).parameters
    for name in ATTACH_OPTIONS & parameters.keys():
        assert FIELDS[name].default == parameters[name].default
        for values in get_args(FIELDS[name].annotation):
            if isinstance(values, str):
                AdapterOptions.model_validate({"alpha": 1.0, name: values})
    for name, table in (("importance", signals.IMPORTANCE), ("routing", signals.ROUTING)):
        assert get_args(FIELDS[name].annotation) == tuple(table)
    assert FIELDS["dropout"].metadata == AdapterOptions.model_fields["dropout"].metadata


def test_infinite_numbers_are_refused() -> None:
    for name in ("learning_rate", "alpha", "gamma"):
        with pytest.raises(ValidationError, match="finite"):
            combine({"model": "m", "data": "d", name: float("inf")})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"move_share": 0.5}, "move_share needs policy move"),
        ({"r_min": 0}, "r_min needs policy prune or move"),
    ],
)
def test_options_of_another_policy_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(model="m", data="d.jsonl", **given)
    moving = Recipe(model="m", data="d.jsonl", policy="move", **given)
    assert moving.options.policy == "move"
