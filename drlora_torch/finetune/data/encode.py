"""Tokens of examples, and which of them bear loss.

Shape letters: T tokens of a row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from drlora_torch.errors import DataError
from drlora_torch.finetune.data.formats import Example

NO_LOSS = -100
"""Label of a token that bears no loss."""
MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a chat template: it says itself which tokens are the assistant's."""


class Encoded(NamedTuple):
    """A row as the model sees it."""

    input_ids: list[int]  # [T]
    labels: list[int]  # [T], NO_LOSS where a token bears none

    def cut(self, length: int) -> Encoded:
        """Return the first tokens."""
        return Encoded(self.input_ids[:length], self.labels[:length])

    @property
    def loss_tokens(self) -> int:
        """How many tokens bear loss."""
        return len(self.labels) - self.labels.count(NO_LOSS)


class Encoder:
    """Turns examples into tokens.

    A completion or text ends with the end-of-sequence token; a chat template ends its turns itself.

    Args:
        tokenizer: of Transformers.
        train_on: ``answers`` (completions and assistant turns) or ``all``.
    """

    def __init__(self, tokenizer: Any, train_on: str = "answers") -> None:
        self._tokenizer, self._all = tokenizer, train_on == "all"
        self._end = tokenizer.eos_token or ""
        template = getattr(tokenizer, "chat_template", None)
        self._marks = isinstance(template, str) and MARKS_ANSWERS.search(template) is not None

    def encode(self, example: Example, place: str) -> list[Encoded]:
        """Return the tokens of an example: one sequence, or the two of a preference pair.

        Raises:
            DataError: the chat template refuses the messages, or hides where the answers are.
        """
        if "text" in example:
            tokens = self._of_text(example["text"])
            return [Encoded(tokens, tokens)]
        try:
            if "chosen" in example:
                return [
                    self._pair(example["prompt"], example[answer], example)
                    for answer in ("chosen", "rejected")
                ]
            if "completion" in example:
                return [self._pair(example["prompt"], example["completion"], example)]
            return [self._dialogue(example["messages"], example)]
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        except Exception as error:  # templates raise errors of Jinja's and of their own
            reason = " ".join(str(error).split())
            raise DataError(f"{place}: the chat template refuses the messages: {reason}") from error

    def _of_text(self, text: str) -> list[int]:
        ended = text if self._end and text.endswith(self._end) else text + self._end
        tokens = list(self._tokenizer(ended)["input_ids"])
        if self._end and tokens[-2:] == [self._tokenizer.eos_token_id] * 2:
            tokens.pop()  # the tokenizer adds one itself
        return tokens

    def _pair(self, prompt: Any, answer: Any, example: Example) -> Encoded:
        if isinstance(answer, str):
            asked, both = self._tokenizer(prompt)["input_ids"], self._of_text(prompt + answer)
        else:
            both = self._render([*prompt, *answer], example)
            asked = self._before(prompt, both, example)
        start = 0 if self._all else _same_beginning(asked, both)
        return Encoded(both, _labels(both, [(start, len(both))]))

    def _dialogue(self, messages: Sequence[dict[str, Any]], example: Example) -> Encoded:
        if self._all:
            tokens = self._render(messages, example)
            return Encoded(tokens, tokens)
        if self._marks:
            made = self._apply(messages, example, return_assistant_tokens_mask=True)
            tokens, mask = list(made["input_ids"]), made["assistant_masks"]
            return Encoded(tokens, [t if m else NO_LOSS for t, m in zip(tokens, mask, strict=True)])
        tokens = self._render(messages, example)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._before(messages[:number], tokens, example)
                until = self._render(messages[: number + 1], example)
                if tokens[: len(until)] != until and number + 1 < len(messages):
                    raise self._hidden(number)
                start = _same_beginning(before, tokens)
                if not number:
                    start = self._header(message, tokens, example)
                spans.append((start, len(until)))
        return Encoded(tokens, _labels(tokens, spans))

    def _before(self, messages: Sequence[Any], tokens: list[int], example: Example) -> list[int]:
        """Tokens before an answer: messages, which must begin the dialogue, and its header."""
        if not messages:
            return []
        bare = self._render(messages, example)
        if tokens[: len(bare)] != bare:
            raise self._hidden(len(messages) - 1)
        return self._render(messages, example, add_generation_prompt=True)

    def _header(self, message: dict[str, Any], tokens: list[int], example: Example) -> int:
        """Tokens before the text of a first message, found by writing another text."""
        other = "x" if str(message.get("content")).startswith("y") else "y"
        return _same_beginning(self._render([{**message, "content": other}], example), tokens)

    @staticmethod
    def _hidden(number: int) -> DataError:
        return DataError(
            f"the chat template renders messages[{number}] differently when others follow, so the "
            "answers cannot be found; use --train-on all, or a --chat-template that marks them "
            "with {% generation %}"
        )

    def _render(self, messages: Sequence[Any], example: Example, **options: Any) -> list[int]:
        if not messages:  # a template renders no empty dialogue, so its header is not known
            return []
        return list(self._apply(messages, example, **options)["input_ids"])

    def _apply(self, messages: Sequence[Any], example: Example, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            list(messages),
            tools=example.get("tools"),
            tokenize=True,
            return_dict=True,
            **{**example.get("chat_template_kwargs", {}), **options},
        )


def _same_beginning(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Number of tokens that two sequences have in common at their beginning."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def _labels(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    labels = [NO_LOSS] * len(tokens)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    return labels
