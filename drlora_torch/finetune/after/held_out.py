"""The rows that a trained model is evaluated on."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console

from drlora_torch.errors import DataError, RunError
from drlora_torch.finetune.data.encode import NO_LOSS, Encoded, Encoder
from drlora_torch.finetune.data.prepare import prepare
from drlora_torch.finetune.data.splits import Examples, Read, read
from drlora_torch.finetune.data.summary import Summary
from drlora_torch.finetune.options import FinetuneOptions


class HeldOut(NamedTuple):
    """Rows with their tokens."""

    rows: list[Encoded]
    """Cut at the run's ``max_length``, without those that then bear no loss."""
    examples: Examples
    """As they were read."""
    summary: Summary

    @property
    def loss_tokens(self) -> int:
        """Tokens that are predicted and bear loss; the first of a row is never predicted."""
        return sum(len(row.labels) - 1 - row.labels[1:].count(NO_LOSS) for row in self.rows)

    def first(self, limit: int) -> HeldOut:
        """Return the first rows."""
        some = self.examples.some(range(min(limit, len(self.examples.examples))))
        return HeldOut(self.rows[:limit], some, self.summary)


class Question(NamedTuple):
    """What a model is asked, and what it should say."""

    prompt: list[int]
    tokens: int
    """Tokens of the answer."""
    answer: str


def read_own(options: FinetuneOptions, tokenizer: Any, before: Summary | None) -> HeldOut:
    """Read and tokenize the rows that a run held out.

    Args:
        options: of the run.
        tokenizer: of the run.
        before: figures of its data; None if they are unknown.

    Raises:
        RunError: they were pairs, or the data has changed: trained rows could be among them.
        DataError: the data is missing, or has rows that cannot be used.
    """
    if options.method == "dpo":
        raise RunError(
            "this run held out pairs of a chosen and a rejected answer, and evaluate takes the "
            "loss of one: give it DATA with texts, messages, or prompts and completions"
        )
    found = read(options, _has_template(tokenizer))
    rows = _tokenize(found.held_out, options, tokenizer)
    trained = len(found.train.examples)
    if before is not None and (rows.summary.rows, trained) != (before.held_out, before.read):
        raise RunError(
            f"the data has changed since the run: {before.read:,} rows to train on and "
            f"{before.held_out:,} held out then, {trained:,} and {rows.summary.rows:,} now; give "
            "evaluate the DATA"
        )
    return rows


def read_other(options: FinetuneOptions, tokenizer: Any, data: str, columns: str | None) -> HeldOut:
    """Read and tokenize other rows as a run would: a validation or test split, or else all.

    Args:
        options: of the run.
        tokenizer: of the run.
        data: file, folder or dataset id.
        columns: those to read, as in ``--columns``; None: as in the run.

    Raises:
        DataError: the data is missing, or has rows that cannot be used.
    """
    changes: dict[str, Any] = {"data": data, "eval_data": data, "method": "sft", "streaming": False}
    if columns is not None:
        changes["columns"] = columns
    asked = FinetuneOptions.model_validate({**options.model_dump(), **changes})
    return _tokenize(read(asked, _has_template(tokenizer)).held_out, asked, tokenizer)


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _tokenize(rows: Examples, options: FinetuneOptions, tokenizer: Any) -> HeldOut:
    if rows.needs_template and not _has_template(tokenizer):
        raise DataError(
            "the data has messages, and the tokenizer of this run no chat template; use prompt and "
            "completion"
        )
    plain = options.model_copy(update={"streaming": False, "packing": False})
    made = prepare(Read(rows, rows, lambda: iter(())), plain, tokenizer, Console(quiet=True))
    encoded = [Encoded(row["input_ids"], row["labels"]) for row in made.held_out]
    return HeldOut(encoded, rows, made.summary)


def questions(held_out: HeldOut, tokenizer: Any) -> list[Question]:
    """Take rows apart into the prompt and its answer, which is the last one of a dialogue.

    Raises:
        RunError: a row has no prompt.
    """
    encoder, found = Encoder(tokenizer), []
    for example, place in held_out.examples.examples:
        tokens, labels = encoder.encode(example, place)[0]
        end = len(labels)
        while end and labels[end - 1] == NO_LOSS:
            end -= 1
        start = end
        while start and labels[start - 1] != NO_LOSS:
            start -= 1
        if not start or start == end:
            raise RunError(f"--exact-match compares answers to prompts, and {place}, has none")
        answer = tokenizer.decode(tokens[start:end], skip_special_tokens=True).strip()
        found.append(Question(tokens[:start], end - start, answer))
    return found
