"""The rows that a trained model is evaluated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from drlora_core.cli.console import say
from drlora_torch.errors import DataError, RunError
from drlora_torch.finetune.after.found import home_of, read_options, read_summary
from drlora_torch.finetune.data.encode import NO_LOSS, Encoded, Encoder
from drlora_torch.finetune.data.prepare import prepare
from drlora_torch.finetune.data.splits import Examples, Read, read
from drlora_torch.finetune.data.summary import FILE as DATA_FILE
from drlora_torch.finetune.data.summary import Summary, check_same
from drlora_torch.finetune.options import FinetuneOptions


class HeldOut(NamedTuple):
    """Rows with their tokens."""

    rows: list[Encoded]
    """Cut at the run's ``max_length``, without those that then bear no loss."""
    examples: Examples
    """The same rows as they were read."""
    summary: Summary

    @property
    def loss_tokens(self) -> int:
        """Tokens of all rows that bear loss."""
        return sum(map(_predicted, self.rows))

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


def read_own(run: Path, tokenizer: Any, console: Console) -> HeldOut:
    """Read and tokenize the rows that a run held out.

    Args:
        run: folder of the run.
        tokenizer: of the run.
        console: is told if nobody knows whether the data is still the same.

    Raises:
        RunError: they were pairs, or the data has changed: trained rows could be among them.
        DataError: the data is missing, or has rows that cannot be used.
    """
    options, before = read_options(run), read_summary(run)
    if options.method == "dpo":
        raise RunError(
            "this run held out pairs of a chosen and a rejected answer, and evaluate takes the "
            "loss of one: give it DATA with texts, messages, or prompts and completions"
        )
    rows = _tokenize(read(options, _has_template(tokenizer)), options, tokenizer)
    if before is None:
        say(
            f"{str(run)!r} has no {DATA_FILE} that can be read: rows that it trained on are among "
            "those of the evaluation if its data has changed since",
            console,
        )
        return rows
    try:
        check_same(home_of(run), rows.summary)
    except RunError as error:
        raise RunError(f"{error}; or give evaluate the DATA") from error
    if rows.summary.held_out != before.held_out:
        raise RunError(
            f"the data has changed since the run: {before.held_out:,} rows held out then, "
            f"{rows.summary.held_out:,} now; give evaluate the DATA"
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
    rows = read(asked, _has_template(tokenizer)).held_out
    return _tokenize(Read(rows, rows, lambda: iter(())), asked, tokenizer)


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _tokenize(found: Read, options: FinetuneOptions, tokenizer: Any) -> HeldOut:
    rows = found.held_out
    if rows.needs_template and not _has_template(tokenizer):
        raise DataError(
            "the data has messages, and the tokenizer of this run no chat template; use prompt and "
            "completion"
        )
    plain = options.model_copy(update={"streaming": False, "packing": False})
    summary = prepare(found, plain, tokenizer, Console(quiet=True)).summary
    encoder = Encoder(tokenizer, options.train_on)
    cut = [encoder.encode(*each)[0].cut(options.max_length) for each in rows.examples]
    kept = [number for number, row in enumerate(cut) if _predicted(row)]
    return HeldOut([cut[number] for number in kept], rows.some(kept), summary)


def _predicted(row: Encoded) -> int:
    """Tokens of a row that bear loss; the first one is never predicted."""
    return len(row.labels) - 1 - row.labels[1:].count(NO_LOSS)


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
