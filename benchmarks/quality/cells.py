"""Cells of the report's tables, and tables as Markdown."""

from __future__ import annotations

import math
import re
import textwrap

import numpy as np

from benchmarks.quality.statistics import Estimate

Rows = list[dict[str, str]]
NOT_RUN = "Not run."


def interval(found: Estimate, digits: int = 3) -> str:
    """Mean and 95 % interval.

    Example:
        >>> interval(Estimate(-0.1234, -0.2, -0.05, 5))
        '-0.123 [-0.200, -0.050]'
        >>> interval(Estimate(-0.1234, -math.inf, math.inf, 2))
        '-0.123 (no interval: n = 2)'
    """
    if not found.count:
        return "-"
    mean = f"{found.mean:+.{digits}f}"
    if math.isinf(found.low):
        return f"{mean} (no interval: n = {found.count})"
    return f"{mean} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation between seeds."""
    if not values.size:
        return "-"
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def wins(group: np.ndarray) -> str:
    """Number of seeds with a lower loss."""
    return f"{int((group < 0).sum())}/{group.size}" if group.size else "-"


def better_or_worse(found: Estimate) -> str:
    """What a difference in loss means: ``better``, ``worse``, ``inconclusive`` or ``not run``."""
    if not found.count:
        return "not run"
    return {-1: "better", 1: "worse", 0: "inconclusive"}[found.side]


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table; ``NOT_RUN`` if there are none."""
    if not rows:
        return NOT_RUN
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    escaped = ([cell.replace("|", "\\|") for cell in row.values()] for row in rows)
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in escaped)])


def wrap(text: str) -> str:
    r"""Wrap the paragraphs and lists of a Markdown text at 100 columns; tables stay as they are.

    Example:
        >>> print(wrap("- one\n  item\n- two"))
        - one item
        - two
    """
    return "\n\n".join(_wrapped(block) for block in text.split("\n\n"))


def _wrapped(block: str) -> str:
    if block.startswith(("|", "#", "<", "```")):
        return block
    items = re.split(r"\n(?=- )", block)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()),
            width=100,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )
