r"""Which names a pattern of PEFT means; no regular expression of a file is run.

PEFT takes every key of ``rank_pattern`` for a regular expression of the last parts of a name. Keys
that are written by PEFT and by drlora are read here: a dotted name, or an escaped one; ``^`` before
and ``$`` behind it; ``.*`` or ``.*\.`` before it; groups of alternatives, ``(?:a|b)``, of which
``?`` makes one optional. There is no repetition, so that reading a name takes a time that is
proportional to its length and that of the pattern. A dot stands for a dot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")
MOST_PARTS, MOST_NESTED = 20_000, 8
"""Alternatives and groups in a configuration, which are tried for every name; groups in groups."""
SPECIAL = set("\\^$*+?{}[]|()")


@dataclasses.dataclass(slots=True)
class Choice:
    """Alternatives."""

    words: dict[int, set[str]] = dataclasses.field(default_factory=dict)  # by their length
    others: list[Parts] = dataclasses.field(default_factory=list)
    optional: bool = False

    def add(self, parts: Parts) -> None:
        if len(parts) == 1 and isinstance(parts[0], str):
            self.words.setdefault(len(parts[0]), set()).add(parts[0])
        else:
            self.others.append(parts)


Parts = list[str | Choice]


class Patterns(Generic[Value]):
    """The values of patterns, in their order.

    Example:
        >>> ranks = Patterns({r"^model\\.(?:a|b)\\.up$": 3, "up": 4, r".*\\.down": 5})
        >>> [ranks.find(name) for name in ("model.b.up", "c.up", "a.down", "down", "cup")]
        [3, 4, 5, None, None]
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._words: dict[str, tuple[int, Value]] = {}  # "^name" in full, "name", ".name" inside
        self._others: list[tuple[bool, bool, Parts, int, Value]] = []
        room = MOST_PARTS
        for order, (pattern, value) in enumerate(values.items()):
            reader = _Reader(pattern, room)
            for exact, anywhere, parts in reader.read():
                word = parts[0] if len(parts) == 1 else None
                if isinstance(word, str) and anywhere == word.startswith("."):
                    self._words.setdefault("^" * exact + word, (order, value))
                else:
                    self._others.append((exact, anywhere, parts, order, value))
            room = reader.room

    def find(self, name: str) -> Value | None:
        """The value of the first pattern that means a name."""
        starts = {0} | {at + 1 for at, letter in enumerate(name) if letter == "."}
        keys = [f"^{name}", *(name[at:] for at in starts), *(name[at - 1 :] for at in starts if at)]
        found = [self._words[key] for key in keys if key in self._words]
        for exact, anywhere, parts, order, value in self._others:
            first = {0} if exact else set(range(len(name) + 1)) if anywhere else starts
            if len(name) in _ends(parts, name, first):
                found.append((order, value))
        return min(found, key=lambda each: each[0])[1] if found else None


def _ends(parts: Sequence[str | Choice], name: str, starts: set[int]) -> set[int]:
    """Where in a name the parts may end that begin at some places."""
    for part in parts:
        if isinstance(part, str):
            starts = {at + len(part) for at in starts if name.startswith(part, at)}
            continue
        ends = {
            at + size
            for size, words in part.words.items()
            for at in starts
            if name[at : at + size] in words
        }
        ends.update(*(_ends(other, name, starts) for other in part.others))
        starts = ends | starts if part.optional else ends
        if not starts:
            break
    return starts


class _Reader:
    """Reads one pattern; ``room`` counts down the parts."""

    def __init__(self, pattern: str, room: int) -> None:
        self.pattern, self.room, self._at = pattern, room, 0

    def read(self) -> list[tuple[bool, bool, Parts]]:
        """The alternatives: whether each is a whole name, whether anything may precede, parts."""
        found = []
        while True:
            exact = self._take("^")
            anywhere = self._take(".*")
            parts = self._sequence(0)
            self._take("$")
            found.append((exact and not anywhere, anywhere, parts))
            if not self._take("|"):
                break
        if self._at < len(self.pattern):
            raise self._refusal()
        return found

    def _take(self, text: str) -> bool:
        taken = self.pattern.startswith(text, self._at)
        self._at += len(text) * taken
        return taken

    def _sequence(self, depth: int) -> Parts:
        """Letters and groups up to the end of the pattern or to what only a group may hold."""
        self.room -= 1
        if self.room < 0 or depth > MOST_NESTED:
            raise self._refusal()
        parts: Parts = []
        letters: list[str] = []
        while (letter := self._letter()) or self._take("("):
            if letter:
                letters.append(letter)
                continue
            if letters:
                parts.append("".join(letters))
                letters = []
            parts.append(self._group(depth + 1))
        if letters:
            parts.append("".join(letters))
        if not parts:
            raise self._refusal()
        return parts

    def _letter(self) -> str:
        """The next letter that stands for itself; empty if none does."""
        letter = self.pattern[self._at : self._at + 1]
        escaped = self.pattern[self._at + 1 : self._at + 2] if letter == "\\" else ""
        if escaped and not escaped.isalnum():
            self._at += 2
            return escaped
        if not letter or letter in SPECIAL or self.pattern.startswith(".*", self._at):
            return ""
        self._at += 1
        return letter

    def _group(self, depth: int) -> Choice:
        self._take("?:")
        choice = Choice()
        choice.add(self._sequence(depth))
        while self._take("|"):
            choice.add(self._sequence(depth))
        if not self._take(")"):
            raise self._refusal()
        choice.optional = self._take("?")
        return choice

    def _refusal(self) -> ValueError:
        shown = self.pattern if len(self.pattern) <= 80 else f"{self.pattern[:80]}..."
        if self.room < 0:
            return ValueError(f"the patterns have more than {MOST_PARTS:,} alternatives: {shown!r}")
        return ValueError(
            f"{shown!r} is no pattern of names at character {self._at}; accepted: dotted names, "
            r"escaped or not, '^' and '$' around them, '.*' or '.*\.' before them, and "
            "alternatives such as '(?:a|b)'; write the names out"
        )
