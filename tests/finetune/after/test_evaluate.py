"""``drlora evaluate``: the loss of the trainer, whatever the batches; answers; lm-eval."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from drlora_torch.errors import RunError
from drlora_torch.finetune.after import harness, scores
from drlora_torch.finetune.after.held_out import Question, questions, read_other, read_own
from drlora_torch.finetune.after.opened import Opened, open_run
from drlora_torch.finetune.after.scores import Loss, measure_loss, measure_matches
from drlora_torch.finetune.data.encode import NO_LOSS
from drlora_torch.finetune.folder import read as read_recipe
from drlora_torch.finetune.folder import write as write_recipe
from drlora_torch.finetune.recipe import Recipe
from tests.finetune.after.conftest import Call
from tests.finetune.after.test_generate import with_template
from tests.finetune.conftest import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_run(run)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(call: Call, *arguments: object) -> dict[str, Any]:
    said = call("evaluate", *arguments, "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_the_loss_on_the_runs_own_rows_is_that_of_the_run(run: Path, call: Call) -> None:
    """The held-out rows of this run are one batch of the trainer."""
    (result,) = json.loads((run / "result.json").read_text())
    found = figures(call, run, "--base")
    assert found["rows"] == 5
    assert found["scores"]["trained"]["loss"] == pytest.approx(result["loss_after"], rel=1e-5)
    assert found["scores"]["base"]["loss"] == pytest.approx(result["loss_before"], rel=1e-5)
    assert result["loss_after"] != pytest.approx(result["loss_before"], rel=1e-2)


def test_the_loss_is_a_mean_over_tokens_whatever_the_batches(
    opened: Opened, tmp_path: Path
) -> None:
    texts = [{"prompt": "a" * n, "completion": "b" * (1 + n % 5)} for n in range(1, 8)]
    data = write(tmp_path / "d.jsonl", texts)
    rows = read_other(opened.options, opened.tokenizer, str(data), None)
    total, tokens = 0.0, 0
    for ids, labels in rows.rows:
        with torch.no_grad():
            logits = opened.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place, label in enumerate(labels[1:]):
            if label != NO_LOSS:
                total -= float(logits[place, label])
                tokens += 1
    assert tokens == rows.loss_tokens == sum(len(t["completion"]) + 1 for t in texts)
    done: list[int] = []
    for size in (1, 3, 16):
        found = measure_loss(opened.model, rows.rows, size, done.append)
        assert found.tokens == tokens
        assert found.total == pytest.approx(total, rel=1e-5)
    assert sum(done) == 3 * len(texts)


def test_a_perplexity_that_is_too_large_is_infinite() -> None:
    assert Loss(2.0, 2).perplexity == pytest.approx(2.718281828)
    assert Loss(1e6, 1).perplexity == float("inf")


def test_other_rows_are_read_with_their_columns(run: Path, call: Call, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"q": "1+1=", "a": "2"}] * 3)
    data = write(tmp_path / "test.jsonl", [{"q": "2+2=", "a": "4"}, {"q": "2+3=", "a": "5"}])
    named = figures(call, run, data, "--columns", "prompt=q,completion=a")
    assert (named["rows"], named["tokens"]) == (2, 4)
    folder = figures(call, run, tmp_path, "--columns", "prompt=q,completion=a")
    assert folder["scores"] == named["scores"]  # its test split
    first = figures(call, run, data, "--columns", "prompt=q,completion=a", "--limit", 1)
    assert (first["rows"], first["tokens"]) == (1, 2)


def test_changed_data_is_not_taken_for_the_runs_own(
    run: Path, opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, tokenizer = shutil.copytree(run, tmp_path / "run"), opened.tokenizer
    lines = Path(str(opened.options.data)).read_text().splitlines()
    data = tmp_path / "sums.jsonl"

    def held_out(*rows: str, **changes: Any) -> int:
        data.write_text("\n".join(rows))
        options = opened.options.model_copy(update={"data": str(data), **changes})
        write_recipe(mine, Recipe.model_validate({**recipe, **options.model_dump()}))
        return len(read_own(mine, tokenizer, Console(stderr=True)).rows)

    recipe = read_recipe(mine).model_dump()
    assert held_out(*lines) == 5
    assert capsys.readouterr().err == ""
    with pytest.raises(RunError, match=r"data has changed .*; or give evaluate the DATA"):
        held_out(*reversed(lines))  # as many rows, and others of them held out
    eval_data = write(tmp_path / "eval.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    with pytest.raises(RunError, match="pairs of a chosen and a rejected"):
        held_out(*lines, method="dpo")
    with pytest.raises(RunError, match="changed"):
        held_out(*lines, eval_data=str(eval_data))
    (mine / "data.json").unlink()
    assert held_out(*reversed(lines)) == 5
    assert "has no data.json that can be read" in " ".join(capsys.readouterr().err.split())


def test_questions_are_those_of_the_rows_with_a_loss(opened: Opened, tmp_path: Path) -> None:
    texts = [{"prompt": "p" * n, "completion": "c"} for n in (1, 900, 2, 3)]
    data = write(tmp_path / "d.jsonl", texts)
    options = opened.options.model_copy(update={"max_length": 64})
    rows = read_other(options, opened.tokenizer, str(data), None)
    first = rows.first(2)
    for held_out, lengths in ((rows, [1, 2, 3]), (first, [1, 2])):
        assert [len(row.input_ids) - 2 for row in held_out.rows] == lengths
        assert [len(one.prompt) for one in questions(held_out, opened.tokenizer)] == lengths


CHAT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "four"},
]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "1+1=", "completion": " 2"}, "1+1=", "2"),
        ({"question": "q", "answer": "a"}, "<|user|>q<end>\n<|assistant|>", "a"),
        (
            {"messages": CHAT},
            "<|user|>1+1<end>\n<|assistant|>2<end>\n<|user|>2+2<end>\n<|assistant|>",
            "four",
        ),
        ({"prompt": "p" * 900, "completion": "c" * 200}, "p" * 900, "c" * 200),  # never cut
    ],
)
def test_a_row_is_taken_apart_into_prompt_and_answer(
    row: dict[str, Any], prompt: str, answer: str, opened: Opened, tmp_path: Path
) -> None:
    tokenizer = with_template()
    options = opened.options.model_copy(update={"train_on": "all"})
    data = write(tmp_path / "d.jsonl", [row])
    (found,) = questions(read_other(options, tokenizer, str(data), None), tokenizer)
    assert (tokenizer.decode(found.prompt), found.answer) == (prompt, answer)
    assert found.tokens >= len(answer)


def test_texts_have_no_answers_to_compare(opened: Opened, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": "abc"}])
    rows = read_other(opened.options, opened.tokenizer, str(data), None)
    with pytest.raises(RunError, match=r"d.jsonl, line 1, has none"):
        questions(rows, opened.tokenizer)


def test_an_answer_counts_if_it_is_the_right_one_word_by_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [Question([n], n, f"answer {n}") for n in range(1, 6)]
    given = {1: "answer 1", 2: " answer 2\n", 3: "answer", 4: "answer 4 more", 5: "Answer 5"}
    longest = []

    def answer(model: Any, tokenizer: Any, prompts: Any, sampling: Any, stop: Any) -> list[str]:
        assert stop == [0]
        assert sampling.temperature == 0
        longest.append(sampling.max_new_tokens - scores.MARGIN)
        return [given[number] for (number,) in prompts]

    monkeypatch.setattr(scores, "generate", answer)
    assert measure_matches(None, None, asked, [0], 2, lambda _: None) == 2
    assert longest == [5, 3, 1]


def test_exact_match_is_the_share_of_the_rows(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch, sums: Path
) -> None:
    right = {row["prompt"]: row["completion"] for row in map(json.loads, sums.open())}
    tokenizer, answered = make_tokenizer(), iter([True, False, True, True, False] * 2)

    def answer(model: Any, _: Any, prompts: Any, *others: Any) -> list[str]:
        asked = [tokenizer.decode(prompt) for prompt in prompts]
        return [right[text] if next(answered) else "wrong" for text in asked]

    monkeypatch.setattr(scores, "generate", answer)
    found = figures(call, run, "--exact-match")
    assert (found["questions"], found["scores"]["trained"]["exact_match"]) == (5, 3 / 5)
    monkeypatch.undo()
    said = call("evaluate", run, "--exact-match", "--base", "--batch-size", 2)
    assert said.code == 0
    assert "rows that the run held out: 5 rows, 12 tokens that bear loss, 5 questions" in said.out
    assert "exact match" in said.out


# -- lm-eval -----------------------------------------------------------------------------------


class Manager:
    all_tasks = ("gsm8k", "arc_easy")

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.all_tasks]


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands for the harness; returns what it was asked."""
    asked: list[dict[str, Any]] = []

    def evaluate(**given: Any) -> dict[str, Any]:
        asked.append(given)
        return {"results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.25}}}

    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    top: Any = sys.modules["lm_eval"]
    top.simple_evaluate = evaluate
    tasks: Any = sys.modules["lm_eval.tasks"]
    tasks.TaskManager = Manager
    models: Any = sys.modules["lm_eval.models.huggingface"]
    models.HFLM = lambda **given: given
    return asked


def test_tasks_are_those_of_the_harness(
    run: Path, call: Call, lm_eval: list[dict[str, Any]]
) -> None:
    found = figures(call, run, "--tasks", "gsm8k", "--base", "--limit", 4)
    assert found == {
        "data": None,
        "rows": 0,
        "tokens": 0,
        "questions": 0,
        "scores": {},
        "tasks": {n: {"gsm8k": {"exact_match,strict": 0.25}} for n in ("base", "trained")},
    }
    assert [each["tasks"] for each in lm_eval] == [["gsm8k"], ["gsm8k"]]
    assert [each["limit"] for each in lm_eval] == [4, 4]
    assert lm_eval[0]["model"]["batch_size"] == 8
    assert lm_eval[0]["apply_chat_template"] is False
    said = call("evaluate", run, "--tasks", "gsm8k", "--exact-match")
    assert "exact_match,strict" in said.out
    assert "rows that the run held out" in said.out


def test_what_the_harness_cannot_do_is_a_sentence(
    lm_eval: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="--tasks gsm8: lm-eval has no such task; did you mean"):
        harness.check_tasks(["gsm8"])

    def fail(**_: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fail)
    with pytest.raises(RunError, match="--tasks gsm8k: lm-eval says: no network"):
        harness.run_tasks(None, None, ["gsm8k"], batch_size=1, limit=None, chat=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RunError, match="pip install lm-eval"):
        harness.check_tasks(["gsm8k"])
