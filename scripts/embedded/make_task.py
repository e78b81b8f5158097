"""Write the default fine-tuning task: reading invented codes.

The task must be new to the model, learnable within two minutes on two CPU cores, and mostly
knowledge. Each of a few invented code books spells every digit by its own syllable. A prompt names
a book and some digits; the completion repeats each digit with its spelling. The books can only be
memorised, and low-rank adapters have barely enough capacity for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

BOOKS = ("kel", "dru", "mip", "zan", "tov", "sey", "gor", "wib")
CONSONANTS = "bcdfghjklmnpqrstvwxz"
VOWELS = "aeiouy"
DIGITS = (4, 6)
"""Minimum and maximum number of digits of a prompt."""


def make_books(rng: np.random.Generator) -> dict[str, list[str]]:
    """A spelling of each digit for each book; syllables are unique within a book."""
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    return {
        book: [syllables[i] for i in rng.choice(len(syllables), size=10, replace=False)]
        for book in BOOKS
    }


def make_rows(
    books: dict[str, list[str]], count: int, rng: np.random.Generator
) -> list[dict[str, str]]:
    """``count`` rows with distinct prompts, spread evenly over the books."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        book = BOOKS[len(rows) % len(BOOKS)]
        digits = rng.integers(0, 10, size=rng.integers(DIGITS[0], DIGITS[1] + 1)).tolist()
        prompt = f"{book} {' '.join(map(str, digits))} ->"
        rows.setdefault(prompt, "".join(f" {d}{books[book][d]}" for d in digits))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def readme(seed: int, train: int, test: int, example: dict[str, str]) -> str:
    """The README of the task."""
    names = ", ".join(f"`{book}`" for book in BOOKS)
    return f"""# The default task: reading invented codes

Each of {len(BOOKS)} invented code books ({names}) spells
every digit by a syllable of its own. A prompt names a book and {DIGITS[0]} to {DIGITS[1]} digits;
the completion repeats each digit with its spelling in that book:

    {json.dumps(example)}

So a model has to copy the digits and to memorise {10 * len(BOOKS)} spellings. `train.jsonl` has
{train} rows and `test.jsonl` {test}; no prompt occurs twice, in or across them. The books are
invented, so the embedded model cannot have seen them in pretraining.

Everything is generated, and the same again with the same seed:

    python scripts/embedded/make_task.py --seed {seed} --train {train} --test {test}
"""


def main(
    output: Annotated[Path, typer.Option(help="Directory to write the task to.")] = Path(
        "drlora_torch/embedded/task"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the books and of the rows.")] = 0,
    train: Annotated[int, typer.Option(min=1, help="Rows to train on.")] = 3000,
    test: Annotated[int, typer.Option(min=1, help="Rows to test on; none is trained on.")] = 300,
) -> None:
    """Write train.jsonl and test.jsonl, with the fields prompt and completion, and README.md."""
    rng = np.random.default_rng(seed)
    books = make_books(rng)
    rows = make_rows(books, train + test, rng)
    order = rng.permutation(len(rows))
    output.mkdir(parents=True, exist_ok=True)
    write(output / "train.jsonl", [rows[i] for i in order[:train]])
    write(output / "test.jsonl", [rows[i] for i in order[train:]])
    (output / "README.md").write_text(readme(seed, train, test, rows[order[0]]))


if __name__ == "__main__":
    typer.run(main)
