"""``drlora generate``: which text, from which tokens, and how it is printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drlora_torch.errors import RunError
from drlora_torch.finetune.after.answers import Show, answer
from drlora_torch.finetune.after.opened import Opened, open_run
from drlora_torch.finetune.after.prompts import Prompter
from drlora_torch.finetune.after.texts import Sampling, generate
from drlora_torch.finetune.data.formats import ALPACA, QUESTION
from tests.finetune.after.conftest import Call
from tests.finetune.conftest import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_run(run)


def likeliest(opened: Opened, prompt: str, length: int) -> str:
    """Greedy generation in a plain loop, without a cache."""
    tokens = opened.tokenizer(prompt)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + length:
        with torch.no_grad():
            logits = opened.model(torch.tensor([tokens])).logits
        if (token := int(logits[0, -1].argmax())) == opened.tokenizer.eos_token_id:
            break
        tokens.append(token)
    return str(opened.tokenizer.decode(tokens[start:]))


def test_the_texts_are_those_of_the_adapter_and_of_the_base(
    run: Path, opened: Opened, call: Call
) -> None:
    said = call("generate", run, "3+4=", "1+", "--base", "--json", "--max-new-tokens", 6)
    assert said.code == 0
    made = json.loads(said.out)
    assert [each["prompt"] for each in made] == ["3+4=", "1+"]
    for each in made:
        assert each["text"] == likeliest(opened, each["prompt"], 6)
        with opened.adapter.disabled():
            assert each["base"] == likeliest(opened, each["prompt"], 6)
        assert each["text"] != each["base"]
    plain = call("generate", run, "3+4=", "--max-new-tokens", 6)
    assert plain.out == made[0]["text"] + "\n"


def test_a_seed_repeats_and_leaves_the_generators_alone(run: Path, call: Call) -> None:
    def draw(seed: int) -> list[str]:
        words = ["--temperature", 1.5, "--seed", seed, "--max-new-tokens", 12, "--json"]
        return [each["text"] for each in json.loads(call("generate", run, "1", "1", *words).out)]

    before = torch.get_rng_state()
    first, other = draw(1), draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == draw(1)
    assert first[0] == first[1] != other[0]


def test_prompts_come_from_standard_input(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff3+4=\n\n1+\r\n"))
    said = call("generate", run, "-", "--max-new-tokens", 2)
    heads = [line for line in said.out.splitlines() if line.startswith("> ")]
    assert heads == ["> 3+4=", "> 1+"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "standard input is empty" in call("generate", run, "-").err


def test_on_a_terminal_the_same_text_is_streamed(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    prompter, sampling = Prompter(opened.tokenizer, "prompt"), Sampling(max_new_tokens=6)
    printed = []
    for stream in (False, True):
        made = answer(opened, prompter, sampling, "3+", base=True, show=Show(True, stream))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0] == (f"> 3+\n[base model]\n{made['base']}\n[trained model]\n{made['text']}\n")


def test_texts_do_not_depend_on_their_batch(opened: Opened) -> None:
    prompts = [opened.tokenizer(text)["input_ids"] for text in ("1", "12+34=", "7+")]
    sampling = Sampling(max_new_tokens=5)
    together = generate(opened.model, opened.tokenizer, prompts, sampling, [])
    alone = [generate(opened.model, opened.tokenizer, [p], sampling, [])[0] for p in prompts]
    assert together == alone


def test_a_text_ends_at_a_stop_token(opened: Opened) -> None:
    prompt = opened.tokenizer("3+4=")["input_ids"]
    (whole,) = generate(opened.model, opened.tokenizer, [prompt], Sampling(max_new_tokens=8), [])
    (second,) = opened.tokenizer(whole[1])["input_ids"]
    (ended,) = generate(
        opened.model, opened.tokenizer, [prompt], Sampling(max_new_tokens=8), [second]
    )
    assert len(ended) < len(whole)
    assert whole.startswith(ended)


def with_template() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


HI = "<|user|>hi<end>\n<|assistant|>"


@pytest.mark.parametrize(
    ("template", "columns", "options", "text"),
    [
        (True, "messages", {}, HI),
        (True, "conversations", {}, HI),
        (True, "question", {}, HI),
        (True, "instruction", {"system": "s"}, "<|system|>s<end>\n" + HI),
        (True, "prompt", {}, "hi"),
        (True, "text", {}, "hi"),
        (True, "", {"chat": False}, "hi"),
        (True, "prompt", {"chat": True}, HI),
        (True, "messages", {"chat": False}, "hi"),
        (False, "question", {}, QUESTION.format(question="hi")),
        (False, "instruction", {}, ALPACA.format(instruction="hi", input="")),
        (False, "instruction", {"chat": False}, "hi"),
    ],
)
def test_a_prompt_becomes_what_the_run_was_trained_on(
    template: bool, columns: str, options: dict[str, Any], text: str
) -> None:
    tokenizer = with_template() if template else make_tokenizer()
    prompter = Prompter(tokenizer, columns, **options)
    assert tokenizer.decode(prompter.encode("hi")) == text
    assert prompter.chat is (text.endswith("<|assistant|>"))


def test_a_chat_ends_where_its_template_ends_a_turn(opened: Opened) -> None:
    tokenizer = with_template()
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert Prompter(tokenizer, "messages").stop_tokens(opened.model) == [0, end]
    assert Prompter(tokenizer, "prompt").stop_tokens(opened.model) == [0]


def test_what_a_template_refuses_is_a_sentence() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RunError, match="chat template refuses the messages: no system role"):
        Prompter(tokenizer, "messages").encode("hi")
    with pytest.raises(RunError, match="has no tokens"):
        Prompter(tokenizer, "text").encode("")
    with pytest.raises(RunError, match=r"add --chat to use .* or --plain"):
        Prompter(tokenizer, "")
    with pytest.raises(RunError, match=r"^the prompt is not UTF-8: 'a\\udcff'$"):
        Prompter(tokenizer, "text").encode("a\udcff")
    with pytest.raises(RunError, match=r"^--system is not UTF-8"):
        Prompter(tokenizer, "messages", system="\udcff")
