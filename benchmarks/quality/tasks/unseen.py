"""Held-out tasks of the later studies: no method was developed on them."""

from __future__ import annotations

import numpy as np

from benchmarks.quality.tasks.task import Row, Task, generate, words

NUMERALS = (
    (1000, "M"),
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)
"""Roman numerals and what they are worth, the largest first."""


def roman_numeral(number: int) -> str:
    """A number from 1 to 3999.

    Example:
        >>> roman_numeral(1994)
        'MCMXCIV'
    """
    text = ""
    for worth, numeral in NUMERALS:
        times, number = divmod(number, worth)
        text += times * numeral
    return text


def roman() -> Task:
    """Held out: write a number in Roman numerals, letter by letter."""

    def draw(rng: np.random.Generator, _: int) -> Row:
        number = int(rng.integers(1, 4000))
        return {
            "prompt": f"{number} in letters:",
            "completion": "".join(f" {letter}" for letter in roman_numeral(number)),
        }

    return generate("roman", draw)


def sorting() -> Task:
    """Held out: sort words, all of them invented, by the alphabet."""
    known = words(np.random.default_rng(71), 40)

    def draw(rng: np.random.Generator, _: int) -> Row:
        chosen = rng.choice(known, size=rng.integers(3, 6), replace=False).tolist()
        return {
            "prompt": f"sorted: {', '.join(chosen)} |",
            "completion": f" {', '.join(sorted(chosen))}",
        }

    return generate("sorting", draw)


def records() -> Task:
    """Held out: invert a record of fields and numbers, and order it by the numbers."""
    fields = words(np.random.default_rng(83), 16)

    def draw(rng: np.random.Generator, _: int) -> Row:
        names = rng.choice(fields, size=rng.integers(2, 5), replace=False).tolist()
        values = rng.choice(np.arange(10, 100), size=len(names), replace=False).tolist()
        pairs = dict(zip(names, values, strict=True))
        there = ", ".join(f"{name}: {value}" for name, value in pairs.items())
        back = ", ".join(
            f"{value}: {name}" for value, name in sorted(zip(values, names, strict=True))
        )
        return {"prompt": f"{there} =>", "completion": f" {back}"}

    return generate("records", draw)
