"""What the columns of a row mean: one of TRL's formats, whatever they are called.

A row becomes ``text``; ``prompt`` and ``completion``; ``messages`` (with ``tools`` and
``chat_template_kwargs``); or ``prompt``, ``chosen`` and ``rejected``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from drlora_core.errors import near_misses
from drlora_torch.errors import DataError
from drlora_torch.finetune.data import values
from drlora_torch.finetune.data.files import Row
from drlora_torch.finetune.data.values import FieldError

Example = dict[str, Any]
ALPACA = "### Instruction:\n{instruction}\n\n{input}### Response:\n"
"""The prompt of instruction data for a model without a chat template (Stanford Alpaca)."""
QUESTION = "Question: {question}\nAnswer: "
"""The prompt of questions for such a model, as evaluation harnesses write it."""


class Format(NamedTuple):
    """Columns that belong together, and how they are read."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any], bool], Example]
    """Takes the values, and whether the tokenizer has a chat template."""


def _text(row: Mapping[str, Any], chat: bool) -> Example:
    return {"text": values.text(row, "text")}


def _pair(row: Mapping[str, Any], chat: bool) -> Example:
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        prompt = values.messages(row, "prompt")
        answer = values.after(prompt, {"completion": values.dialogue(row, "completion")})
        return {"prompt": prompt, **answer, **values.chat_extras(row)}
    if extra := next((name for name in EXTRAS if row.get(name)), None):
        raise FieldError(extra, "needs messages: prompt and completion are texts")
    return {
        "prompt": values.text(row, "prompt", empty=True),
        "completion": values.text(row, "completion"),
    }


def _messages(row: Mapping[str, Any], chat: bool) -> Example:
    return {"messages": values.dialogue(row, "messages"), **values.chat_extras(row)}


def _conversations(row: Mapping[str, Any], chat: bool) -> Example:
    turns = values.share_gpt(row, "conversations")
    if row.get("system") not in (None, "") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": values.text(row, "system")}, *turns]
    return {"messages": turns, **values.chat_extras(row)}


def _question(row: Mapping[str, Any], chat: bool) -> Example:
    question, answer = values.text(row, "question"), values.text(row, "answer")
    return _asked(question, QUESTION.format(question=question), answer, chat)


def _instruction(row: Mapping[str, Any], chat: bool) -> Example:
    instruction, output = values.text(row, "instruction"), values.text(row, "output")
    given = "" if row.get("input") is None else values.text(row, "input", empty=True)
    plain = ALPACA.format(
        instruction=instruction, input=f"### Input:\n{given}\n\n" if given else ""
    )
    return _asked(f"{instruction}\n\n{given}" if given else instruction, plain, output, chat)


def _asked(message: str, plain: str, answer: str, chat: bool) -> Example:
    if not chat:
        return {"prompt": plain, "completion": answer}
    return {
        "messages": [
            {"role": "user", "content": message},
            {"role": "assistant", "content": answer},
        ]
    }


def _preference(row: Mapping[str, Any], chat: bool) -> Example:
    if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
        both = {name: values.messages(row, name) for name in ("chosen", "rejected")}
        if row.get("prompt") is None:
            return values.split_prompt(both["chosen"], both["rejected"])
        if isinstance(row["prompt"], str):
            prompt = [{"role": "user", "content": values.text(row, "prompt")}]
        else:
            prompt = values.messages(row, "prompt")
        return {"prompt": prompt, **values.after(prompt, both)}
    if row.get("prompt") is None:
        raise FieldError("prompt", "is missing: chosen and rejected are texts, not messages")
    asked = {"prompt": values.text(row, "prompt", empty=True)}
    return asked | {name: values.text(row, name) for name in ("chosen", "rejected")}


EXTRAS = ("tools", "chat_template_kwargs")
SFT = (
    Format(("messages",), EXTRAS, _messages),
    Format(("conversations",), (*EXTRAS, "system"), _conversations),
    Format(("prompt", "completion"), EXTRAS, _pair),
    Format(("question", "answer"), (), _question),
    Format(("instruction", "output"), ("input",), _instruction),
    Format(("text",), (), _text),
)
DPO = (Format(("chosen", "rejected"), ("prompt",), _preference),)


class Reader:
    """Turns rows into examples, by the format of the first row.

    Args:
        name: of the data, for errors.
        method: ``sft`` or ``dpo``.
        columns: names of fields of a format to those of the data's columns.
        chat: whether the tokenizer has a chat template.
    """

    def __init__(
        self, name: str, method: str, columns: Mapping[str, str] | None, chat: bool
    ) -> None:
        self._name, self._chat = name, chat
        self._formats = DPO if method == "dpo" else SFT
        self._columns = dict(columns or {})
        known = dict.fromkeys(f for each in self._formats for f in (*each.needs, *each.may))
        for field in self._columns:
            if field not in known:
                raise DataError(f"--columns: no field {field!r}; {near_misses(field, known)}")
        self.format: Format | None = None
        self.ignored: tuple[str, ...] = ()
        """Columns that no field takes."""

    def read(self, row: Row) -> Example:
        """Return a row as an example.

        Raises:
            DataError: names the file, the row, the field and what is wrong.
        """
        renamed = self._rename(row)
        if self.format is None:
            self.format = self._choose(renamed)
            used = {*self.format.needs, *self.format.may}
            self.ignored = tuple(name for name in renamed if name not in used)
        if missing := [name for name in self.format.needs if name not in renamed]:
            raise DataError(
                f"{row.place}: has no {' and no '.join(missing)}, which the first row has"
            )
        try:
            return self.format.read(renamed, self._chat)
        except FieldError as error:
            field = self._columns.get(error.field, error.field)
            raise DataError(f"{row.place}: {field} {error.reason}") from error

    def _rename(self, row: Row) -> dict[str, Any]:
        if not self._columns:
            return row.values
        taken = set(self._columns.values())
        renamed = {name: value for name, value in row.values.items() if name not in taken}
        for field, column in self._columns.items():
            if column not in row.values:
                hint = near_misses(column, row.values)
                raise DataError(f"{row.place}: no column {column!r} (--columns); {hint}")
            renamed[field] = row.values[column]
        return renamed

    def _choose(self, columns: Collection[str]) -> Format:
        mapped = set(self._columns)
        for each in self._formats:  # a field that was given a column decides
            if set(each.needs) <= set(columns) and mapped <= {*each.needs, *each.may}:
                return each
        accepted = "; ".join(" and ".join(each.needs) for each in self._formats)
        raise DataError(
            f"data {self._name!r} has columns {', '.join(columns)}; accepted: {accepted}; or say "
            f"which they are, such as --columns {_suggestion(columns, self._formats)}"
        )


def _suggestion(columns: Iterable[str], formats: tuple[Format, ...]) -> str:
    names = [*filter(None, columns), "COLUMN", "COLUMN"]
    fields = ("chosen", "rejected") if formats is DPO else ("prompt", "completion")
    return ",".join(f"{field}={name}" for field, name in zip(fields, names, strict=False))
