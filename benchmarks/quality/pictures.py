"""Charts made of characters, for the Markdown pages: they need no image files and diff well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import numpy as np

from benchmarks.quality.statistics import Estimate

WIDTH = 61
SHADES = " ·▁▂▃▄▅▆▇█"


def intervals(estimates: Mapping[str, Estimate]) -> str:
    """Means (●) and 95 % intervals (─), one per line, on a common axis with zero (│).

    Example:
        >>> print(intervals({"a": Estimate(-1.0, -2.0, 0.0, 5)}))  # doctest: +ELLIPSIS
        a ├──...●...
    """
    shown = {name: found for name, found in estimates.items() if found.count}
    if not shown:
        return ""
    ends = [0.0]
    for found in shown.values():
        ends += [value for value in (found.mean, found.low, found.high) if np.isfinite(value)]
    low, high = min(ends), max(ends)
    scale = (WIDTH - 1) / (high - low or 1.0)
    margin = max(map(len, shown))
    lines = [f"{name:{margin}} {_line(found, low, scale)}" for name, found in shown.items()]
    axis = f"{low:+.3f}".ljust(WIDTH - 6) + f"{high:+.3f}"
    return "\n".join([*lines, f"{'':{margin}} {axis}"])


def _line(found: Estimate, low: float, scale: float) -> str:
    def at(value: float) -> int:
        return round((value - low) * scale)

    line = [" "] * WIDTH
    line[at(0.0)] = "│"
    if np.isfinite(found.low):
        left, right = at(found.low), at(found.high)
        line[left : right + 1] = ["─"] * (right + 1 - left)
        line[left], line[right] = "├", "┤"
    line[at(found.mean)] = "●"
    return "".join(line).rstrip()


def curves(values: Mapping[str, Mapping[int, float]], height: int = 18) -> str:
    """Values of several methods over a common axis of columns, each point a letter (a, b, ...).

    Letters of points that fall on one place stand beside each other.

    Args:
        values: by method and column.
        height: lines between the largest and the smallest value.

    Example:
        >>> print(curves({"one": {1: 0.0, 2: 1.0}, "two": {1: 0.0}}, height=2))
        +1.000 |         a
        +0.000 | ab
               +-----------------
                 1       2
        a one, b two
    """
    columns = sorted({column for by_column in values.values() for column in by_column})
    points = [value for by_column in values.values() for value in by_column.values()]
    low, high = min(points), max(points)
    step = (high - low) / (height - 1) or 1.0
    rows: list[dict[int, str]] = [{} for _ in range(height)]
    for letter, by_column in zip(ascii_lowercase, values.values(), strict=False):
        for column, value in by_column.items():
            row = rows[round((high - value) / step)]
            row[column] = row.get(column, "") + letter
    lines = [
        f"{high - i * step:+.3f} | " + "".join(f"{row.get(c, ''):8}" for c in columns)
        for i, row in enumerate(rows)
    ]
    names = ", ".join(f"{a} {name}" for a, name in zip(ascii_lowercase, values, strict=False))
    axis = " " * 9 + "".join(f"{column:<8}" for column in columns)
    lines += [" " * 7 + "+" + "-" * (8 * len(columns) + 1), axis, names]
    return "\n".join(line.rstrip() for line in lines)


def heat_map(ranks: Mapping[str, np.ndarray], relevance: Mapping[str, np.ndarray]) -> str:
    """Final ranks of the experts as numbers and their relevance as shades, layer by layer.

    Args:
        ranks: mean final rank of every expert [N] by layer.
        relevance: known relevance of every expert [N] by layer, 0 or more.
    """
    lines = []
    margin = max(map(len, ranks))
    for layer, values in ranks.items():
        lines.append(f"{layer:{margin}} rank      " + " ".join(f"{v:4.1f}" for v in values))
        known = np.asarray(relevance.get(layer, np.zeros(len(values))), dtype=float)
        lines.append(f"{'':{margin}} relevance " + " ".join(f"{s:>4}" for s in _shades(known)))
    return "\n".join(lines)


def _shades(values: np.ndarray) -> Sequence[str]:
    top = values.max() or 1.0
    return [SHADES[int(np.ceil(v / top * (len(SHADES) - 1)))] * 2 for v in values]
