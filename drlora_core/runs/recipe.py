"""The recipe of a run, as its ``run.yaml`` has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drlora_core.errors import import_extra
from drlora_core.runs.metrics import to_step

NATS = "nats per token"
MOST_BYTES, MOST_NESTED = 2**16, 20
"""Of a recipe, which has a few thousand and one level; PyYAML takes long for nested lists."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RunRecipe:
    """All options of a ``drlora finetune``."""

    text: str
    """The file."""
    options: Mapping[str, Any]
    """The options by name; empty if the file is no YAML mapping."""

    @property
    def made_by(self) -> str:
        """The versions that made the run: the last comment at the top of the file."""
        lines = self.text.splitlines()
        head = [line[2:] for line in lines[:2] if line.startswith("# ") and "Python" in line]
        return head[-1] if head else ""

    @property
    def steps(self) -> int:
        """Planned optimizer steps; 0 if the file does not say."""
        return to_step(self.options.get("steps")) or 0

    @property
    def loss_unit(self) -> str:
        """What losses are counted in."""
        return "DPO loss" if self.options.get("method") == "dpo" else NATS


def check_yaml(yaml: Any, text: str) -> None:
    """Refuse a text that takes long to read: a large or nested one, or one that repeats parts.

    Args:
        yaml: PyYAML, which only an extra installs.
        text: that is to be read.

    Raises:
        ValueError: says which, and what is accepted.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} characters; accepted: at most {MOST_BYTES:,}")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it repeats a part by an alias (*name); write the part out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise ValueError(f"its lists are nested more than {MOST_NESTED} deep")


def read_recipe(path: Path) -> RunRecipe | None:
    """Read a recipe; None without the file.

    Raises:
        DRLoRAError: PyYAML is not installed (extra ``report``).
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    yaml = import_extra("yaml", "report")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        check_yaml(yaml, text)
        options = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        options = None
    return RunRecipe(text, options if isinstance(options, dict) else {})
