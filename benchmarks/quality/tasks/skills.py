"""Generated skills: string operations, arithmetic in a new notation, and two held-out tasks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.quality.tasks.task import Row, Task, generate, words

LETTERS = "abcdefghiklmnoprstvwxy"
"""Letters that are a single token after a space."""

STRING_OPERATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda s: s[::-1],
    "rotate": lambda s: s[1:] + s[0],
    "swap": lambda s: "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2)),
    "double": lambda s: "".join(c + c for c in s),
    "skip": lambda s: s[::2],
    "ends": lambda s: s[-1] + s[1:-1] + s[0],
    "next": lambda s: "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in s),
    "mirror": lambda s: s + s[::-1],
}


def _letters(rng: np.random.Generator, low: int, high: int) -> str:
    return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(low, high + 1)))


def _spaced(text: str) -> str:
    return "".join(f" {letter}" for letter in text)


def strings() -> Task:
    """Permute, repeat or replace the letters of a short string, by the operation in the prompt."""
    names = list(STRING_OPERATIONS)

    def draw(rng: np.random.Generator, number: int) -> Row:
        name, text = names[number % len(names)], _letters(rng, 3, 4)
        result = STRING_OPERATIONS[name](text)
        return {"prompt": f"{name}{_spaced(text)} ->", "completion": _spaced(result)}

    return generate("strings", draw)


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "@": lambda a, b: a + b,
    "#": lambda a, b: abs(a - b),
    "&": max,
    "%": lambda a, b: a + 2 * b,
    "~": lambda a, b: 100 - a - b,
}


def notation() -> Task:
    """Arithmetic with invented numerals and operators.

    A completion writes the problem in ordinary digits and then the result, so numerals are to be
    memorised and results to be computed.
    """
    numerals = words(np.random.default_rng(31), 10, syllables=1)
    symbols = list(ARITHMETIC)

    def spell(value: int) -> str:
        return " ".join(numerals[int(digit)] for digit in str(value))

    def draw(rng: np.random.Generator, number: int) -> Row:
        symbol, (a, b) = symbols[number % len(symbols)], rng.integers(0, 50, size=2).tolist()
        return {
            "prompt": f"{spell(a)} {symbol} {spell(b)} =",
            "completion": f" {a}, {b}: {ARITHMETIC[symbol](a, b)}",
        }

    return generate("notation", draw)


def cipher() -> Task:
    """Held out: substitute letters by the table of a key word.

    The completion names each letter before its substitute.
    """
    rng = np.random.default_rng(47)
    keys = words(rng, 6)
    tables = {key: rng.permutation(list(LETTERS)).tolist() for key in keys}

    def draw(rng: np.random.Generator, number: int) -> Row:
        key, text = keys[number % len(keys)], _letters(rng, 3, 6)
        pairs = "".join(letter + tables[key][LETTERS.index(letter)] for letter in text)
        return {"prompt": f"{key}:{_spaced(text)} =>", "completion": _spaced(pairs)}

    return generate("cipher", draw)


MONTHS = (19, 23, 17, 29, 21, 26, 18, 24)
"""Days of the invented months."""
WEEK = 6
"""Days of the invented week."""


def calendar() -> Task:
    """Held out: add days to a date of an invented calendar, and give the weekday."""
    names = words(np.random.default_rng(59), len(MONTHS) + WEEK)
    months, weekdays = names[: len(MONTHS)], names[len(MONTHS) :]
    dates = [(day + 1, m) for m, days in enumerate(MONTHS) for day in range(days)]

    def draw(rng: np.random.Generator, _: int) -> Row:
        start, days = int(rng.integers(len(dates))), int(rng.integers(1, 31))
        (day, month), (then, there) = dates[start], dates[(start + days) % len(dates)]
        weekday = weekdays[(start + days) % len(dates) % WEEK]
        return {
            "prompt": f"{day} {months[month]} + {days} days is",
            "completion": f" {then} {months[there]}, {weekday}",
        }

    return generate("calendar", draw)
