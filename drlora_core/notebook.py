"""What objects show at a prompt and in a notebook: a line of text, or a small table of HTML.

All of it takes plain values that are at hand, so that showing an object never waits or changes it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SHOWN_ROWS = 20
CELL_CHARACTERS, TITLE_CHARACTERS = 80, 200
LAYER_COLUMNS = ("layer", "experts", "smallest rank", "mean rank", "largest rank", "total rank")


class Text(str):
    """Text that a prompt shows with its line breaks, as ``print`` does."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def count(number: int, noun: str) -> str:
    """Format a number of things.

    Example:
        >>> count(1, "layer"), count(2000, "layer")
        ('1 layer', '2,000 layers')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shorten(text: str, characters: int = CELL_CHARACTERS) -> str:
    """Cut a long text in its middle: names of layers differ at the end."""
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]}…{text[-half:]}"


def total_rank(ranks: Mapping[str, Any]) -> int:
    """Sum the ranks, or their changes, of all layers, given by name."""
    return sum(int(np.sum(values)) for values in ranks.values())


def describe_layers(ranks: Mapping[str, Any]) -> str:
    """Say how many layers and experts there are: ranks [N] by layer name."""
    sizes = sorted({len(values) for values in ranks.values()})
    layers = count(len(ranks), "layer")
    if len(sizes) == 1:
        return f"{layers} of {count(sizes[0], 'expert')}"
    experts = sum(len(values) for values in ranks.values())
    return f"{layers}, {count(experts, 'expert')}"


def layer_row(name: str, ranks: Any) -> tuple[object, ...]:
    """Return a layer's row under ``LAYER_COLUMNS``."""
    if not len(ranks):
        return (name, 0, "-", "-", "-", 0)
    mean = f"{np.mean(ranks):.2f}"
    return (name, len(ranks), int(np.min(ranks)), mean, int(np.max(ranks)), int(np.sum(ranks)))


def describe_engine(
    policy: str, step: int, pending: bool, ranks: Mapping[str, Any], r_target: int
) -> str:
    """Describe an engine in a line; ``pending``: a step more is not closed yet."""
    waiting = ", another one pending" if pending else ""
    text = f"{policy}, step {step}{waiting}, {describe_layers(ranks)}"
    if ranks:
        budget = r_target * sum(len(values) for values in ranks.values())
        text += f", total rank {total_rank(ranks):,} of {budget:,}"
    return text


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, more: int = 0
) -> str:
    """Render rows as an HTML table without styles, scripts or anything to load.

    Args:
        title: the caption.
        columns: the headings; none for a table of names and values.
        rows: the cells; at most ``SHOWN_ROWS`` rows are shown, and a line counts the others.
        more: rows that were left out before.
    """
    rows = list(rows)
    head = "".join(f"<th>{_escape(name)}</th>" for name in columns)
    lines = [f"<table><caption>{_escape(title, TITLE_CHARACTERS)}</caption>"]
    lines += [f"<thead><tr>{head}</tr></thead>"] if columns else []
    lines.append("<tbody>")
    for row in rows[:SHOWN_ROWS]:
        lines.append("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>")
    if (hidden := len(rows[SHOWN_ROWS:]) + more) > 0:
        width = max(len(columns), 1)
        lines.append(f'<tr><td colspan="{width}">and {hidden:,} more</td></tr>')
    return "\n".join([*lines, "</tbody></table>"])


def layers_table(title: str, ranks: Mapping[str, Any]) -> str:
    """Render the ranks of layers, [N] by name, as an HTML table with a row per layer."""
    first = list(ranks.items())[:SHOWN_ROWS]
    rows = [layer_row(name, values) for name, values in first]
    return html_table(title, LAYER_COLUMNS, rows, more=len(ranks) - len(first))


def _escape(value: object, characters: int = CELL_CHARACTERS) -> str:
    """Cut a text, and make it harmless in HTML and in UTF-8."""
    text = shorten(str(value), characters)
    return html.escape(text.encode("utf-8", "replace").decode())
