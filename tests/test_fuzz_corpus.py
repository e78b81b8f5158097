"""The smallest damage of each kind that a reader once fell over, or took too long for."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from scripts.fuzz import attempts

Change = Callable[[bytes], bytes]


def field(name: str, value: Any) -> Change:
    return lambda content: json.dumps({**json.loads(content), name: value}).encode()


def deep(name: str, depth: int) -> Change:
    nested = "[" * depth + "]" * depth
    return lambda content: field(name, "HERE")(content).replace(b'"HERE"', nested.encode())


def instead(content: str | bytes) -> Change:
    made = content.encode() if isinstance(content, str) else content
    return lambda _: made


def parquet(array: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), stream)
    return stream.getvalue()


def many_aliases() -> str:
    lines = ["a0: &a0 {x: y}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    return "\n".join(lines)


NOT_UTF8 = pyarrow.StringArray.from_buffers(
    1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xf9\xf9")
)
CASES: dict[str, tuple[str, str, Change]] = {
    "gzip: a block of no kind": (
        "rows",
        "zipped.jsonl.gz",
        lambda content: content[:10] + b"\x07" + content[11:],
    ),
    "gzip: cut": ("rows", "zipped.jsonl.gz", lambda content: content[:-9]),
    "Parquet: text that is not UTF-8": ("rows", "table.parquet", instead(parquet(NOT_UTF8))),
    "JSON lines: numbers of 5,000 digits": (
        "rows",
        "pairs.jsonl",
        instead('{"prompt": 1e4, "completion": ' + "9" * 4000 + "}"),
    ),
    "YAML: lists in lists": ("run", "run.yaml", instead("[" * 2000)),
    "YAML: lists in lists, in a recipe": ("recipe", "run.yaml", instead("steps: " + "[" * 2000)),
    "YAML: aliases of aliases": ("run", "run.yaml", instead(many_aliases())),
    "YAML: aliases of aliases, in a recipe": ("recipe", "run.yaml", instead(many_aliases())),
    "YAML: many names": (
        "recipe",
        "run.yaml",
        instead("".join(f"a{number}: 1\n" for number in range(100_000))),
    ),
    "PEFT: a large alpha": ("peft", "adapter_config.json", field("lora_alpha", 10**15)),
    "PEFT: a pattern that hangs": (
        "peft",
        "adapter_config.json",
        field("rank_pattern", {"(a+)+$": 4}),
    ),
    "model: a large vocabulary": ("shape", "config.json", field("vocab_size", 10**400)),
    "profile: a number of 401 digits": ("profile", "profile.json", field("a", [[10**400], [1]])),
    "template: nested deeply": ("template", "template.jinja", instead("{{ " + "[" * 900)),
    "tokenizer: a length that is text": (
        "tokenizer",
        "tokenizer_config.json",
        field("model_max_length", "9"),
    ),
    "model: many layers": ("family", "config.json", field("num_hidden_layers", 10_000)),
    "model: many layers of another part": (
        "family",
        "config.json",
        field("vision_config", {"depth": 10**6}),
    ),
    "model: a number of 4,000 digits": ("shape", "config.json", field("num_experts", 10**4000)),
    **{
        f"JSON: {depth} lists in lists, {target}": (target, file, deep("step", depth))
        for target, file in (
            ("shape", "config.json"),
            ("settings", "allocator.json"),
            ("snapshot", "state.json"),
            ("run", "recording/recording.json"),
        )
        for depth in (180, 900, 985)
    },
    "JSON: half of a surrogate pair": ("snapshot", "state.json", field("layers", {"\ud800": {}})),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_refused_or_read_in_time(case: str, tmp_path: Path) -> None:
    name, file, change = CASES[case]
    # Most took minutes or for ever; the first reader of a process also imports its libraries.
    target = dataclasses.replace(attempts.ALL[name], seconds=15.0)
    target.write(tmp_path)
    changed = tmp_path / file
    changed.write_bytes(change(changed.read_bytes()))
    attempts.attempt(target, tmp_path)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_rows_of_any_depth_are_refused(depth: int, tmp_path: Path) -> None:
    """Python's reader takes lists that its writer, called deeper in the stack, does not."""
    nested = "[" * depth + "]" * depth
    rows = f'{{"prompt": {nested}, "completion": "a"}}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "list.jsonl").write_text(nested)
    attempts.attempt(attempts.ALL["rows"], tmp_path)
