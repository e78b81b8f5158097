"""Tokens and labels against what TRL makes, and where the answers of a dialogue are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from drlora_torch.errors import DataError
from drlora_torch.finetune.data.encode import NO_LOSS, Encoded, Encoder
from tests.finetune.conftest import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "22"},
]


def tokenizer(template: str | None = None) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def encode(example: dict[str, Any], template: str | None = PLAIN, on: str = "answers") -> Encoded:
    (encoded,) = Encoder(tokenizer(template), on).encode(example, "f, line 1")
    return encoded


def learned(encoded: Encoded) -> list[str]:
    """The texts that bear loss."""
    parts, last = [], False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, NO_LOSS)
        if label != NO_LOSS:
            text = tokenizer().decode([token])
            parts = [*parts[:-1], parts[-1] + text] if last else [*parts, text]
        last = label != NO_LOSS
    return parts


EXAMPLES: list[tuple[dict[str, Any], list[str]]] = [
    ({"text": "abc"}, ["abc<eos>"]),
    ({"text": "abc<eos>"}, ["abc<eos>"]),
    ({"prompt": "1+1=", "completion": "2"}, ["2<eos>"]),
    ({"prompt": "", "completion": "2"}, ["2<eos>"]),
    ({"prompt": TALK[:1], "completion": TALK[1:2]}, ["1<eos>"]),
    ({"messages": TALK}, ["1<eos>", "22<eos>"]),
    ({"messages": [SYSTEM, *TALK[:2]]}, ["1<eos>"]),
    ({"messages": [*TALK, {"role": "user", "content": "bye"}]}, ["1<eos>", "22<eos>"]),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, ["hi<eos>"]),
]


@pytest.mark.parametrize(("example", "answers"), EXAMPLES)
def test_completions_and_assistant_turns_bear_loss(
    example: dict[str, Any], answers: list[str]
) -> None:
    encoded = encode(example)
    assert learned(encoded) == answers
    whole = encode(example, on="all")
    assert whole.input_ids == whole.labels == encoded.input_ids
    assert encoded.loss_tokens == sum(label != NO_LOSS for label in encoded.labels)


def test_a_template_that_marks_the_answers_is_believed() -> None:
    assert learned(encode({"messages": TALK}, MARKED)) == ["1", "22"]


@pytest.mark.parametrize(
    "example", [example for example, _ in EXAMPLES if "messages" not in example]
)
def test_tokens_and_labels_are_those_of_trl(example: dict[str, Any], tmp_path: Path) -> None:
    """TRL tokenizes these formats alike, so figures of earlier runs still hold."""
    made = tokenizer(PLAIN)
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = made, PLAIN, True
    rows = datasets.Dataset.from_list([example, example])
    arguments = SFTConfig(output_dir=str(tmp_path), max_length=99, report_to="none", use_cpu=True)
    theirs = trainer._prepare_dataset(rows, made, arguments, False, None, "train")
    own = encode(example)
    assert next(iter(theirs["input_ids"])) == own.input_ids
    assert next(iter(theirs["labels"])) == own.labels


def test_tools_and_arguments_reach_the_template() -> None:
    template = "{{ tools[0]['name'] }}{{ mood }}" + PLAIN
    example = {"messages": TALK, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "ok"}}
    encoded = encode(example, template)
    assert tokenizer().decode(encoded.input_ids).startswith("fok<user>one?")


def test_an_answer_that_the_template_renders_differently_later_is_refused() -> None:
    forgets = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"f, line 1: .* messages\[1\] differently .*--train-on all"
    ):
        encode({"messages": TALK}, forgets)
    assert encode({"messages": TALK}, forgets, on="all").loss_tokens > 0


def test_what_the_template_refuses_is_told() -> None:
    strict = "{{ raise_exception('no ' + messages[0]['role']) }}"
    with pytest.raises(
        DataError, match="f, line 1: the chat template refuses the messages: no user"
    ):
        encode({"messages": TALK}, strict)


def test_a_pair_to_prefer_gives_two_sequences() -> None:
    example = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    chosen, rejected = Encoder(tokenizer()).encode(example, "")
    assert (learned(chosen), learned(rejected)) == (["good<eos>"], ["bad<eos>"])


def test_cutting_keeps_the_beginning() -> None:
    encoded = Encoded([5, 6, 7], [NO_LOSS, 6, 7])
    assert encoded.cut(2) == ([5, 6], [NO_LOSS, 6])
    assert encoded.cut(9) == encoded


SYSTEM_LAST = (  # as Mistral's: the system prompt stands before the last message only
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}"
    "<{{ messages[0]['content'] }}>{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
)
ADDS_SYSTEM = "<sys>You are kind" + PLAIN


def test_a_prompt_that_the_template_renders_differently_alone_is_refused() -> None:
    dialogue = [SYSTEM, *TALK[:2]]
    examples = ({"messages": dialogue}, {"prompt": dialogue[:2], "completion": dialogue[2:]})
    for example in examples:
        with pytest.raises(DataError, match=r"messages\[1\] differently .*--train-on all"):
            encode(example, SYSTEM_LAST)


def test_a_default_system_prompt_bears_no_loss() -> None:
    first = {"messages": [{"role": "assistant", "content": "hi"}, *TALK[:2]]}
    assert learned(encode(first, ADDS_SYSTEM)) == ["hi<eos>", "1<eos>"]
    assert learned(encode({"messages": TALK}, ADDS_SYSTEM)) == ["1<eos>", "22<eos>"]


def test_a_tokenizer_that_adds_the_end_itself_adds_one() -> None:
    made = tokenizer()
    made._tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", made.eos_token_id)]
    )
    (encoded,) = Encoder(made).encode({"prompt": "1+1=", "completion": "2"}, "")
    assert encoded.input_ids.count(made.eos_token_id) == 1
