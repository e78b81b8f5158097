"""Help in sections: plain text that stays readable on 60 columns, with one section per panel."""

from __future__ import annotations

import textwrap
from typing import Any

from typer.core import TyperCommand

FOLDED = 4


class SectionedCommand(TyperCommand):
    """A command whose help lists its options under their ``rich_help_panel``.

    The panels of rich take half of a narrow line for borders, types and names, and read brackets as
    markup; this is the plain help of click with more than one heading.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and the other sections in the order in which they first occur."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is None:
                continue
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            heading = getattr(param, "rich_help_panel", None) or usual
            sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if not records:
                continue
            with formatter.section(heading):
                room = formatter.width - formatter.current_indent
                formatter.write_dl([(_fold(name, room), text) for name, text in records])


def _fold(name: str, room: int) -> str:
    """Fold an option with a long list of choices, ``--what [a|b|c]``."""
    if len(name) <= room:
        return name
    lines = textwrap.wrap(name.replace("|", "| "), room - FOLDED, break_on_hyphens=False)
    return f"\n{' ' * 2 * FOLDED}".join(line.replace("| ", "|") for line in lines)
