"""Tasks: disjoint splits, the same rows every time, readable files, clear refusals."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.models import SHIPPED, load_model
from benchmarks.quality.tasks import CONTROLLED, DEVELOPMENT, HELD_OUT, load_task
from benchmarks.quality.tasks.files import MOST_HELD_OUT
from benchmarks.quality.tasks.skills import LETTERS, STRING_OPERATIONS

NAMES = [*DEVELOPMENT, *HELD_OUT, *CONTROLLED]


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def global_states() -> list[object]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the one that must not be used
    return [random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_in_two_splits_nor_twice_in_one(name: str) -> None:
    task = load_task(name)
    prompts = [row["prompt"] for split in task.splits.values() for row in split]
    assert len(set(prompts)) == len(prompts)
    assert all(len(split) >= 150 for split in task.splits.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_are_the_same_every_time_and_leave_global_generators_alone(name: str) -> None:
    before = global_states()
    assert load_task(name) == load_task(name)
    assert global_states() == before


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_completion_join_at_a_token_boundary(name: str) -> None:
    _, tokenizer = load_model("embedded")
    for row in load_task(name).test[:50]:
        assert row["completion"].startswith(" ")
        apart = [tokenizer(row[part])["input_ids"] for part in ("prompt", "completion")]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == apart[0] + apart[1]
        assert tokenizer.decode(apart[0] + apart[1]) == row["prompt"] + row["completion"]


def test_strings_do_what_their_operation_says() -> None:
    expected = {
        "reverse": "dcba",
        "rotate": "bcda",
        "swap": "badc",
        "double": "aabbccdd",
        "skip": "ac",
        "ends": "dbca",
        "next": "bcde",
        "mirror": "abcddcba",
    }
    assert {name: change("abcd") for name, change in STRING_OPERATIONS.items()} == expected
    assert STRING_OPERATIONS["next"](LETTERS[-1]) == LETTERS[0]
    for row in load_task("strings").test:
        name, *letters = row["prompt"].removesuffix(" ->").split()
        assert row["completion"].split() == list(STRING_OPERATIONS[name]("".join(letters)))


def test_calendar_counts_as_a_walk_over_days_does() -> None:
    """Weekday and date advance together: equal dates always have equal weekdays."""
    seen: dict[str, str] = {}
    for row in load_task("calendar").train:
        date, weekday = row["completion"].split(",")
        assert seen.setdefault(date, weekday) == weekday
    assert len(seen) > 100


def read_roman(letters: list[str]) -> int:
    """A numeral before a larger one is taken away, any other is added."""
    worth = dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))
    values = [worth[letter] for letter in letters]
    later = [*values[1:], 0]
    return sum(-v if v < after else v for v, after in zip(values, later, strict=True))


def test_unseen_tasks_by_slow_references() -> None:
    for row in load_task("roman").test:
        letters = row["completion"].split()
        assert read_roman(letters) == int(row["prompt"].split()[0])
        assert not any("".join(letters).count(4 * letter) for letter in "IXCM")
    for row in load_task("sorting").test:
        given = row["prompt"].removeprefix("sorted: ").removesuffix(" |").split(", ")
        found = row["completion"].strip().split(", ")
        assert set(found) == set(given)
        assert len(found) == len(given)
        assert all(a <= b for a, b in itertools.pairwise(found))
    for row in load_task("records").test:
        there = row["prompt"].removesuffix(" =>").split(", ")
        back = row["completion"].strip().split(", ")
        assert {": ".join(pair.split(": ")[::-1]) for pair in back} == set(there)
        numbers = [int(pair.split(": ")[0]) for pair in back]
        assert len(numbers) == len(there)
        assert all(a < b for a, b in itertools.pairwise(numbers))


def test_the_mixture_is_even() -> None:
    codes = set(map(str, load_task("codes").train))
    train = load_task("mixture").train
    assert sum(str(row) in codes for row in train) * 2 == len(train)


RECORDS = {
    "prompt": lambda n: {"prompt": f"say {n}", "completion": f" {n}"},
    "question": lambda n: {"question": f"what is {n}?", "answer": f"{n}"},
    "chat": lambda n: {
        "messages": [
            {"role": "system", "content": "count"},
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": f"{n}\n"},
        ]
    },
}
READ = {
    "prompt": {"prompt": "say 7", "completion": " 7"},
    "question": {"prompt": "what is 7?\n", "completion": "7"},
    "chat": {"prompt": "System: count\nUser: say 7\nAssistant:", "completion": " 7"},
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_file_is_split_by_prompt(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "rows.jsonl", [RECORDS[kind](n % 300) for n in range(600)])
    task = load_task(str(path))
    splits = [{row["prompt"] for row in split} for split in task.splits.values()]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 300
    assert sum(len(split) for split in task.splits.values()) == 600
    assert READ[kind] in [row for split in task.splits.values() for row in split]


def test_a_test_file_is_the_test_split_and_nothing_of_it_is_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [RECORDS["prompt"](n) for n in range(200)])
    test = write(tmp_path / "test.jsonl", [RECORDS["prompt"](n) for n in range(100, 900)])
    task = load_task(f"{train},{test}")
    assert len(task.test) == MOST_HELD_OUT
    assert len(task.train) + len(task.validation) == 100
    assert {row["completion"] for row in task.train} <= {f" {n}" for n in range(100)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "line 2: a row has the fields"),
        ({"prompt": "a", "completion": " "}, "line 2: a row's prompt or completion is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message must be"),
        ({"completion": "a"}, "line 2: 'prompt'"),
        ({"prompt": 3, "completion": 3}, "line 2"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, record: dict[str, object], message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [RECORDS["prompt"](0), record])
    with pytest.raises(ValueError, match=message):
        load_task(str(path))


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no task 'code'; accepted: codes, "):
        load_task("code")
    with pytest.raises(ValueError, match="there is no file"):
        load_task(str(tmp_path / "none.jsonl"))
    few = write(tmp_path / "few.jsonl", [RECORDS["prompt"](0)])
    with pytest.raises(ValueError, match="leaves no rows for"):
        load_task(str(few))


@pytest.mark.parametrize("dtype", ["int64", "nonsense"])
def test_a_model_has_a_floating_type(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"got {dtype}"):
        load_model("embedded", dtype=dtype)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_are_small_and_read_tokens_alike(name: str) -> None:
    model, tokenizer = load_model(name)
    assert sum(file.stat().st_size for file in SHIPPED[name].iterdir()) < 8_000_000
    assert len(tokenizer) == model.config.vocab_size


def test_the_shipped_models_share_one_tokenizer_file() -> None:
    stored = [path for folder in SHIPPED.values() for path in folder.glob("tokenizer*")]
    assert sorted(stored) == sorted(SHIPPED["embedded"].glob("tokenizer*"))


def test_the_qwen_model_has_read_its_text() -> None:
    """Words of its corpus surprise it less than the same words in another order."""
    model, tokenizer = load_model("qwen")
    text = "    def __init__(self, name):\n        self.name = name\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        read, unread = (model(input_ids=i, labels=i).loss.item() for i in (ids, shuffled))
    assert read < unread - 2


def test_a_folder_is_a_model() -> None:
    model, tokenizer = load_model(str(SHIPPED["embedded"]), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token is not None
