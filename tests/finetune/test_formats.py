"""What columns mean, and which values are refused."""

from __future__ import annotations

from typing import Any

import pytest

from drlora_torch.errors import DataError
from drlora_torch.finetune.data.files import Row
from drlora_torch.finetune.data.formats import Reader

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TALK = [USER, ASSISTANT]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
Values = dict[str, Any]


def read(
    values: Values, method: str = "sft", columns: dict[str, str] | None = None, chat: bool = True
) -> Values:
    return Reader("data", method, columns, chat).read(Row(values, "f.jsonl, line 1"))


@pytest.mark.parametrize(
    ("values", "example"),
    [
        ({"text": "t"}, {"text": "t"}),
        ({"prompt": "", "completion": "c"}, {"prompt": "", "completion": "c"}),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            {"prompt": [USER], "completion": [ASSISTANT]},
        ),
        ({"messages": TALK, "id": 3}, {"messages": TALK}),
        ({"messages": [{**USER, "name": None}, ASSISTANT]}, {"messages": TALK}),
        ({"messages": '[{"role": "assistant", "content": "a"}]'}, {"messages": [ASSISTANT]}),
        (
            {"messages": [USER, CALL], "tools": [{"type": "function"}]},
            {"messages": [USER, {**CALL, "content": ""}], "tools": [{"type": "function"}]},
        ),
        (
            {"messages": TALK, "tools": None, "chat_template_kwargs": {"enable_thinking": False}},
            {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
            {"messages": TALK},
        ),
        ({"conversations": SHARED}, {"messages": TALK}),
        ({"conversations": TALK}, {"messages": TALK}),
        (
            {"conversations": SHARED, "system": "s"},
            {"messages": [{"role": "system", "content": "s"}, *TALK]},
        ),
        ({"question": "q", "answer": "a"}, {"messages": TALK}),
        ({"instruction": "q", "output": "a"}, {"messages": TALK}),
        (
            {"instruction": "i", "input": "q", "output": "a"},
            {"messages": [{"role": "user", "content": "i\n\nq"}, ASSISTANT]},
        ),
    ],
)
def test_every_format_is_read(values: Values, example: Values) -> None:
    assert read(values) == example


def test_questions_and_instructions_need_no_chat_template() -> None:
    assert read({"question": "q", "answer": "a"}, chat=False) == {
        "prompt": "Question: q\nAnswer: ",
        "completion": "a",
    }
    for given, part in (({}, ""), ({"input": ""}, ""), ({"input": "x"}, "### Input:\nx\n\n")):
        assert read({"instruction": "i", "output": "o", **given}, chat=False) == {
            "prompt": f"### Instruction:\ni\n\n{part}### Response:\n",
            "completion": "o",
        }


@pytest.mark.parametrize(
    ("values", "example"),
    [
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"prompt": "p", "chosen": "c", "rejected": "r"},
        ),
        (
            {"chosen": TALK, "rejected": [USER, {"role": "assistant", "content": "b"}]},
            {
                "prompt": [USER],
                "chosen": [ASSISTANT],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
        ),
        (
            {
                "prompt": "q",
                "chosen": [ASSISTANT],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            {
                "prompt": [USER],
                "chosen": [ASSISTANT],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
        ),
    ],
)
def test_pairs_to_prefer_are_read(values: Values, example: Values) -> None:
    assert read(values, "dpo") == example


def test_columns_are_renamed_and_what_is_left_is_named() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    reader = Reader("data", "sft", columns, chat=True)
    row = Row({"question": "q", "answer": "a", "id": 1}, "f, line 1")
    assert reader.read(row) == {"prompt": "q", "completion": "a"}
    assert reader.ignored == ("id",)


def test_a_prompt_is_not_repeated_in_its_answers() -> None:
    other = {"role": "assistant", "content": "b"}
    whole = {"chosen": TALK, "rejected": [USER, other]}
    answers = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}
    assert read({"prompt": "q", **whole}, "dpo") == answers
    assert read({"prompt": [USER], **whole}, "dpo") == answers
    assert read({"prompt": [USER], "completion": TALK}) == {
        "prompt": [USER],
        "completion": [ASSISTANT],
    }
    with pytest.raises(DataError, match="chosen must be the answer to the prompt, or both"):
        read({"prompt": "another", **whole}, "dpo")


BAD: list[tuple[Values, str]] = [
    ({"prompt": "p", "completion": "c", "tools": [{"name": "f"}]}, "tools needs messages"),
    ({"messages": TALK, "chat_template_kwargs": {"tokenize": False}}, "sets 'tokenize', which"),
    ({"messages": "[" * 100_000}, "messages must be a list of messages"),
    ({"prompt": [USER], "completion": [USER]}, "completion has no message with role assistant"),
    ({"text": None}, "f.jsonl, line 1: text must be a text, got null"),
    ({"text": 5}, "text must be a text, got the number 5"),
    ({"text": True}, "text must be a text, got the truth value true"),
    ({"text": ""}, "text is empty"),
    ({"text": ["a"]}, "text must be a text, got a list: "),
    ({"text": "\ud800"}, "text holds half of a surrogate pair"),
    ({"prompt": "p", "completion": ""}, "completion is empty"),
    ({"prompt": "p", "completion": 4.5}, "completion must be a text, got the number 4.5"),
    ({"prompt": [USER], "completion": "c"}, "completion must be a list of messages, got "),
    ({"messages": None}, "messages must be a list of messages, got null"),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": ["hi"]}, r"messages\[0\] must be an object with role and content"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
    ({"messages": SHARED}, r"messages\[0\] has no role; --columns conversations="),
    ({"messages": [USER]}, "messages has no message with role assistant"),
    (
        {"messages": [{"role": "user"}, ASSISTANT]},
        r"messages\[0\].content must be a text, got null",
    ),
    ({"messages": [{"role": 3, "content": "x"}]}, r"messages\[0\].role must be a text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
        r'messages\[0\].content\[0\] must be a part of type text, got "image_url"',
    ),
    ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, r"tool_calls must be a list"),
    ({"messages": TALK, "tools": {"a": 1}}, "tools must be a list, got an object"),
    ({"messages": TALK, "chat_template_kwargs": 1}, "chat_template_kwargs must be an object"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, r"\[0\].from is 'alien'; known: human"),
    (
        {"conversations": [{"value": "x"}]},
        r"conversations\[0\] must be an object with from and value",
    ),
    ({"instruction": "i", "output": "o", "input": 3}, "input must be a text, got the number 3"),
    ({"ask": "q"}, "has columns ask; accepted: messages; .*--columns prompt=ask,completion=COLUMN"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD)
def test_bad_values_are_refused_with_place_and_field(values: Values, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read(values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"chosen": "c", "rejected": "r"}, "prompt is missing"),
        ({"chosen": TALK, "rejected": TALK}, "must begin alike and end differently"),
        ({"prompt": "p", "completion": "c"}, "accepted: chosen and rejected"),
    ],
)
def test_bad_pairs_are_refused(values: Values, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read(values, "dpo")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"promt": "question"}, "--columns: no field 'promt'; did you mean 'prompt'"),
        ({"prompt": "questoin"}, "no column 'questoin' .*did you mean 'question'"),
        ({"prompt": "question"}, "data 'data' has columns"),
    ],
)
def test_bad_columns_are_refused(columns: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read({"question": "q", "answer": "a"}, columns=columns)


def test_a_row_without_what_the_first_has_is_refused() -> None:
    reader = Reader("data", "sft", None, chat=True)
    reader.read(Row({"prompt": "p", "completion": "c"}, "line 1"))
    with pytest.raises(DataError, match="line 2: has no completion, which the first row has"):
        reader.read(Row({"prompt": "p"}, "line 2"))


def test_a_mistake_in_a_renamed_column_is_told_by_its_own_name() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    with pytest.raises(DataError, match="answer must be a text, got null"):
        read({"question": "q", "answer": None}, columns=columns)
