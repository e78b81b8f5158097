"""Check the values of a row's fields: texts, messages, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
OURS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
    "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "tokenize", "tools", "truncation",
}  # fmt: skip
"""Arguments of ``apply_chat_template`` that a row must not change."""
SHARE_GPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class FieldError(ValueError):
    """What is wrong with a field of a row."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason


def text(row: Mapping[str, Any], field: str, *, empty: bool = False) -> str:
    """Return the text in a field; only a prompt may be empty."""
    return _text(row[field], field, empty=empty)


def _text(value: object, field: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"must be a text, got {_describe(value)}")
    if not value and not empty:
        raise FieldError(field, "is empty")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise FieldError(field, "holds half of a surrogate pair, which is no character")
    return value


def _describe(value: object) -> str:
    if value is None:
        return "null"
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "the truth value "),
        ((int, float), "the number "),
        (list, "a list: "),
        (dict, "an object: "),
    )
    kind = next((name for types, name in kinds if isinstance(value, types)), "")
    try:
        shown = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # Python prints neither longer integers nor deeper lists
        shown = "..."
    return kind + (shown if len(shown) <= 60 else f"{shown[:57]}...")


def messages(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return a list of messages, each with a role and a content or tool calls."""
    given = _from_json(row[field])
    if not isinstance(given, list):
        raise FieldError(field, f"must be a list of messages, got {_describe(given)}")
    if not given:
        raise FieldError(field, "is an empty list")
    return [_message(message, f"{field}[{number}]") for number, message in enumerate(given)]


def dialogue(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return messages of which at least one is the assistant's."""
    found = messages(row, field)
    if all(message["role"] != "assistant" for message in found):
        raise FieldError(field, "has no message with role assistant, so nothing would be learned")
    return found


def _message(message: object, field: str) -> Message:
    if not isinstance(message, dict):
        raise FieldError(
            field, f"must be an object with role and content, got {_describe(message)}"
        )
    if "role" not in message:
        hint = "; --columns conversations=... reads from and value" if "from" in message else ""
        raise FieldError(field, f"has no role{hint}")
    kept = {name: value for name, value in message.items() if value is not None}
    kept["role"] = _text(message["role"], f"{field}.role")
    if not (kept.get("tool_calls") and kept.get("content") is None):
        kept["content"] = _content(message.get("content"), f"{field}.content")
    if "tool_calls" in kept and not isinstance(kept["tool_calls"], list):
        raise FieldError(
            f"{field}.tool_calls", f"must be a list, got {_describe(kept['tool_calls'])}"
        )
    kept.setdefault("content", "")
    return kept


def _content(content: object, field: str) -> str:
    """The text of a message; parts of type text are joined."""
    if not isinstance(content, list):
        return _text(content, field, empty=True)
    found = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            raise FieldError(
                f"{field}[{number}]", f"must be a part of type text, got {_describe(kind or part)}"
            )
        found.append(_text(part.get("text"), f"{field}[{number}].text", empty=True))
    return "".join(found)


def share_gpt(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return the turns of ShareGPT's format (``from`` and ``value``) as messages."""
    turns = _from_json(row[field])
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return dialogue(row, field)
    if not isinstance(turns, list) or not turns:
        raise FieldError(field, f"must be a list of turns, got {_describe(turns)}")
    found = []
    for number, turn in enumerate(turns):
        where = f"{field}[{number}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise FieldError(where, f"must be an object with from and value, got {_describe(turn)}")
        role = SHARE_GPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            known = ", ".join(SHARE_GPT_ROLES)
            raise FieldError(f"{where}.from", f"is {turn['from']!r}; known: {known}")
        found.append({"role": role, "content": _text(turn["value"], f"{where}.value", empty=True)})
    return dialogue({field: found}, field)


def chat_extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return tools (a list) and arguments of the chat template (an object), where given."""
    extras: dict[str, Any] = {}
    for field, kind in (("tools", list), ("chat_template_kwargs", dict)):
        given = _from_json(row.get(field))
        if given is None or given == "":
            continue
        if not isinstance(given, kind):
            name = "a list" if kind is list else "an object"
            raise FieldError(field, f"must be {name}, got {_describe(given)}")
        extras[field] = given
    if taken := sorted(OURS & extras.get("chat_template_kwargs", {}).keys()):
        raise FieldError("chat_template_kwargs", f"sets {taken[0]!r}, which drlora sets itself")
    return extras


def split_prompt(chosen: list[Message], rejected: list[Message]) -> dict[str, list[Message]]:
    """Split two dialogues into the messages that both begin with, and the rest of each."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same in (0, len(chosen), len(rejected)):
        raise FieldError("chosen", "and rejected must begin alike and end differently")
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def after(prompt: list[Message], answers: Mapping[str, list[Message]]) -> dict[str, list[Message]]:
    """Return answers without the prompt that they may begin with."""
    found = {}
    for field, messages in answers.items():
        given = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if not given or given[0]["role"] == "user":
            raise FieldError(field, "must be the answer to the prompt, or both")
        found[field] = given
    return found


def _from_json(value: object) -> object:
    """Lists and objects come as JSON text in CSV files and in some data sets."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
