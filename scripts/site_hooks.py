"""Hooks of MkDocs: the command-line reference, equations, and links to the repository."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert

from drlora_core.cli.app import build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMANDS = "<!-- commands -->"
WIDTH = 80  # columns of a code block in a browser
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Replace ``folder/*`` in the navigation by the pages of that folder: generators add some."""
    for section in config.nav:
        (entries,) = section.values()
        for entry in entries:
            if isinstance(entry, dict) and (value := next(iter(entry.values()))).endswith("/*"):
                pages = sorted(DOCS.glob(f"{value}.md"))
                entry.update(
                    {name: [f"{value[:-1]}{page.name}" for page in pages] for name in entry}
                )
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Insert the help of every command; let links that leave docs/ lead to the repository."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, describe_commands())
    folder = (DOCS / page.file.src_uri).parent

    def lead_out(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        if target.is_relative_to(DOCS) or not target.exists():
            return found[0]  # MkDocs checks it
        kind = "tree" if target.is_dir() else "blob"
        place = target.relative_to(ROOT).as_posix()
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{place}{found[2] or ''})"

    return LINK.sub(lead_out, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn equations into MathML, which browsers show without a script."""

    def render(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return str(convert(html.unescape(found[2]).strip(), display=display))

    return EQUATION.sub(render, content)


def describe_commands() -> str:
    """Return a section for each command, with what ``--help`` prints."""
    group = typer.main.get_group(build()[0])
    parts = []
    for name, command in group.commands.items():
        context = command.make_context(
            f"drlora {name}",
            [],
            resilient_parsing=True,
            terminal_width=WIDTH,
            max_content_width=WIDTH,
        )
        parts.append(f"## drlora {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)
