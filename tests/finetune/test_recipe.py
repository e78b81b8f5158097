"""Recipes: from YAML and the command line, resolved, written, and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from drlora_torch.errors import RunError
from drlora_torch.finetune import folder
from drlora_torch.finetune.recipe import (
    Recipe,
    absolute,
    combine,
    read_fields,
    shipped_run,
    to_yaml,
)
from drlora_torch.finetune.words import format_word, parse_names, parse_pairs
from tests.finetune.test_options import OTHER


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    for recipe in (Recipe(**OTHER), combine({}), Recipe(model="m", data="d", learning_rate=3e-5)):
        file = write(tmp_path / "r.yaml", to_yaml(recipe))
        again = combine({}, file)
        assert again == recipe.model_copy(update={"output": None})
        assert set(yaml.safe_load(file.read_text())) == set(Recipe.model_fields) - {"output"}


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.yaml",
        "model: m\ndata: d.jsonl\nlearning-rate: 2e-4\nr_max: 20\ngradient_checkpointing: true\n"
        "modules_to_save: [lm_head]\ncolumns: {prompt: ask, completion: reply}\n",
    )
    recipe = combine({"r_max": 40, "gradient_checkpointing": False}, file)
    assert recipe == Recipe(
        model="m",
        data="d.jsonl",
        learning_rate=2e-4,  # YAML 1.1 reads 2e-4 as text
        r_max=40,
        modules_to_save=("lm_head",),
        columns={"prompt": "ask", "completion": "reply"},
    )


@pytest.mark.parametrize(("one", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_steps_and_epochs_that_are_given_replace_those_of_the_file(
    tmp_path: Path, one: str, other: str
) -> None:
    file = write(tmp_path / "r.yaml", f"model: m\ndata: d.jsonl\n{other}: 2\n")
    assert combine({one: 3}, file) == Recipe.model_validate(
        {"model": "m", "data": "d.jsonl", one: 3}
    )
    assert getattr(combine({"r_max": 40}, file), other) == 2
    with pytest.raises(ValidationError, match="give steps or epochs, not both"):
        combine({one: 3, other: 2}, file)


def test_a_file_without_a_model_is_of_the_shipped_one(tmp_path: Path) -> None:
    assert combine({}, write(tmp_path / "r.yaml", "steps: 3\n")) == Recipe.model_validate(
        {**shipped_run(), "steps": 3}
    )
    assert combine({}, write(tmp_path / "r.yaml", "# nothing\n")) == combine({})


BAD_FILES = {
    "lerning_rate: 1": "no option 'lerning_rate'; did you mean 'learning_rate'",
    "steps: 1\nsteps: 2": "option 'steps' is there twice",
    "steps: &a 1\nbatch_size: *a": "repeats a part by an alias",
    "steps: " + "[" * 30: "nested more than 20 deep",
    "steps: 1 #" + "a" * 2**16: "accepted: at most 65,536",
    "[1, 2]": "must hold options",
    "a: [": "cannot be read",
    "learning_rate: 1\nlearning-rate: 2": "option 'learning_rate' is there twice",
    "steps: yes": "steps cannot be True",
    "run_name: 2001-13-45": "cannot be read",
    "[" * 3000: "cannot be read",
    "!!python/object/apply:os.system ['true']": "cannot be read",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"r\.yaml'.*{BAD_FILES[text]}"):
        combine({}, write(tmp_path / "r.yaml", text))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read: No such file"):
        read_fields(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="cannot be read"):
        read_fields(tmp_path / "binary.yaml")


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"steps": 3, "epochs": 1}, "give steps or epochs, not both"),
    ({"steps": 0}, "steps\n  must be at least 1, got 0"),
    ({"steps": "many"}, "steps"),
    ({"streaming": True}, "streaming needs steps"),
    ({"patience": 2}, "patience needs eval_every"),
    ({"patience": 2, "eval_every": 4, "save_every": 4}, "leave save_every out"),
    ({"compare": "uniform", "adapter": "a"}, "would train the same twice"),
    ({"compare": "uniform", "policy": "uniform"}, "would train the same twice"),
    ({"data": ""}, "data"),
    ({"seed": 2**32}, "seed"),
    ({"attention_targets": "q_proj"}, "need attention_rank"),
    ({"method": "dpo", "packing": True}, "dpo takes neither packing nor streaming"),
    ({"method": "dpo", "train_on": "all"}, "leave train_on out"),
    ({"beta": 0.5}, "beta needs method dpo"),
    ({"eval_data": "e.jsonl", "eval_fraction": 0.5}, "with eval_data, leave it out"),
    ({"columns": "prompt"}, "write FIELD=COLUMN"),
    ({"columns": "prompt=a,prompt=b"}, "'prompt' is given twice"),
    ({"modules_to_save": ""}, "modules_to_save"),
    ({"optimizer": "adamw"}, "optimizer"),
    ({"lr_scheduler": "cosin"}, "did you mean 'cosine'"),
    ({"warmup_ratio": 1.0}, "warmup_ratio"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"compare": "prune"}, "compare"),
    ({"processes": -1}, "processes"),
    ({"fsdp_size": 0}, "fsdp_size"),
    ({"steps": 10**400}, "steps\n  must be at most 1,000,000,000, got 1000"),
    ({"steps": 10**13}, "steps\n  must be at most 1,000,000,000"),
    ({"epochs": 1e300}, "epochs\n  must be at most"),
    ({"growth_end": 10**15}, "growth_end\n  must be at most 1,000,000,000,000"),
    ({"steps": 100, "r_max": 40_000_000}, "r_max\n  must be at most 100,000, .* no matrix"),
    ({"alpha": 1e308}, "alpha\n  must be at most 1,000,000"),
    ({"gamma": 1e308}, "gamma\n  must be at most 50"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD_VALUES)
def test_bad_values_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        combine({"model": "m", "data": "d.jsonl", **values})


def test_model_and_data_come_together() -> None:
    with pytest.raises(RunError, match="a MODEL needs DATA"):
        combine({"model": "m"})
    with pytest.raises(RunError, match="a DATA needs MODEL"):
        combine({"data": "d.jsonl"})


def test_paths_become_absolute_and_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    recipe = combine({"model": "m", "data": "d.jsonl", "chat_template": "t", "adapter": "me/it"})
    moved = absolute(recipe)
    assert (moved.model, moved.data) == (str(tmp_path / "m"), str(tmp_path / "d.jsonl"))
    assert (moved.chat_template, moved.adapter) == (str(tmp_path / "t"), "me/it")
    assert absolute(combine({"model": "org/model", "data": "org/data"})).data == "org/data"


@pytest.mark.parametrize("policy", ["greedy", "uniform", "prune", "move"])
@pytest.mark.parametrize(
    "given", [{}, {"timetable": "late"}, {"warmup_steps": 9, "growth_end": 40}]
)
def test_a_resolved_recipe_makes_the_same_decisions(policy: str, given: dict[str, Any]) -> None:
    ranks = {"r_target": 8} if policy == "prune" else {}
    options = Recipe(model="m", data="d", steps=100, policy=policy, **ranks, **given).options
    resolved = options.resolved(None)
    assert resolved.allocator_config() == options.allocator_config()
    assert resolved.resolved(None) == resolved
    longer = resolved.model_copy(update={"steps": 500})
    assert longer.allocator_config() == options.allocator_config()  # the window does not move
    assert resolved.uniform().allocator_config().starting_rank == options.r_target


@pytest.mark.parametrize(
    ("rows", "options", "steps"),
    [
        (100, {"epochs": 1, "batch_size": 10}, 10),
        (101, {"epochs": 1, "batch_size": 10}, 11),
        (100, {"epochs": 0.5, "batch_size": 10, "accumulation": 2}, 3),
        (3, {"epochs": 0.01, "batch_size": 10}, 1),
        (3, {}, 200),
        (3, {"steps": 7}, 7),
    ],
)
def test_epochs_become_steps(rows: int, options: dict[str, Any], steps: int) -> None:
    assert Recipe(model="m", data="d", **options).options.resolved(rows).steps == steps


@pytest.mark.parametrize("steps", [1, 19, 20, 60, 140, 200, 1000, 12345])
def test_the_default_warmup_of_the_learning_rate_is_a_twentieth(steps: int) -> None:
    options = Recipe(model="m", data="d", steps=steps).options
    assert options.learning_rate_warmup == max(steps // 20, 1)
    assert options.model_copy(update={"warmup_ratio": 0.0}).learning_rate_warmup == 0


def test_words_are_parsed_and_written() -> None:
    assert parse_names("a, b,,c") == ("a", "b", "c")
    assert parse_names(["a"]) == ["a"]
    assert parse_pairs("a=b=c, d = e") == {"a": "b=c", "d": "e"}
    for value in (("a", "b"), {"a": "b", "c": "d"}):
        parse = parse_pairs if isinstance(value, dict) else parse_names
        assert parse(format_word(value)) == value


def test_a_run_that_goes_on_notes_what_changes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder.create(run, Recipe(model="m", data="d.jsonl", steps=4, processes=2))
    (run / folder.RESULT).write_text("[]")
    before = (run / folder.RECIPE).read_bytes()
    same = folder.read(run)
    folder.extend(run, same.model_copy(update={"processes": 1, "batch_size": 32}))
    assert (run / folder.RECIPE).read_bytes() == before
    assert (run / folder.RESULT).exists()
    folder.extend(run, same.model_copy(update={"steps": 8, "processes": 1, "eval_every": 2}))
    assert folder.read(run) == same.model_copy(update={"steps": 8, "eval_every": 2})
    assert not (run / folder.RESULT).exists()
