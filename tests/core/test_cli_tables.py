"""Tables fit their console: nothing is cut off, in pipes nothing is folded, ASCII is enough."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")

from rich.console import Console

from drlora_core.cli import console as consoles
from drlora_core.cli import main
from drlora_core.cli.tables import format_cell, show_table

ROWS = [
    {"name": "a layer with a long name", "mean_rank": 4.25, "bytes": "1,024.00 MiB", "events": 3},
    {"name": "b", "mean_rank": float("nan"), "bytes": "-", "events": 12_345},
]


def shown(width: int, encoding: str = "utf-8", **options: Any) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show_table("Title", ROWS, console=Console(file=stream, width=width), **options)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 30, 40, 48, 60, 80, 10_000])
@pytest.mark.parametrize("spare", [(), ("events",)])
def test_every_word_is_shown_at_every_width(width: int, spare: tuple[str, ...]) -> None:
    text = shown(width, figures=("bytes",), spare=spare, note="a note")
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines == [line.rstrip() for line in lines] or width < 40  # as rich folds sentences
    assert "…" not in text
    words = " ".join(re.findall(r"[\w.,-]+", text))
    for cell in ("1,024.00", "MiB", "4.250", "layer", "note"):
        assert cell in words
    if "no room for: events" in text:
        assert spare == ("events",)
    else:
        assert "12,345" in text


def test_figures_are_not_folded_and_headers_are() -> None:
    rows = shown(60, figures=("bytes",)).splitlines()
    assert any("1,024.00 MiB" in line for line in rows)
    narrow = shown(40, figures=("bytes",), spare=("events",))
    assert "no room for: events; --json has all" in narrow.replace("\n", " ")
    assert "mean rank" in narrow
    folded = shown(43, figures=("bytes",))
    assert "mean rank" not in folded
    assert "12,345" in folded
    blocks = shown(30)
    assert "  a layer with a long name\n    mean rank: 4.250\n" in blocks


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_borders_are_ascii_where_the_encoding_is_not_unicode(encoding: str) -> None:
    assert shown(80, encoding).isascii()
    assert "┃" in shown(80)


def test_cells() -> None:
    values = (None, float("nan"), True, False, 1234, 0.5, "x")
    assert [*map(format_cell, values)] == ["-", "-", "yes", "no", "1,234", "0.500", "x"]


def test_blocks_are_those_that_the_console_can_show() -> None:
    for encoding in ("utf-8", "ascii", "cp1252"):
        console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        made = consoles.blocks(console)
        assert len(set(made)) == 8
        assert made.encode(encoding)


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert consoles.make_console().width == consoles.UNBOUNDED
    monkeypatch.setenv("COLUMNS", "60")
    assert consoles.make_console().width == 60
    assert consoles.make_console(stderr=True).stderr


@pytest.fixture
def commands(run_dir: Path, model: Path, tmp_path: Path) -> list[list[str]]:
    np.savez(tmp_path / "é.npz", weight_sum=np.ones((20, 2, 8)), tokens=np.ones(20, dtype=int))
    sizes = ["--num-experts", "64"]  # without Transformers
    return [
        ["--help"],
        ["plan", "--help"],
        ["plan", str(model), "--steps", "400", *sizes],
        ["plan", str(model), "--json", *sizes],
        ["replay", str(run_dir), "--policies", "all", "--against", str(run_dir)],
        ["replay", str(tmp_path / "é.npz")],
        ["report", str(tmp_path / "é.npz"), "--json", "-o", str(tmp_path / "é.json")],
        ["report", str(tmp_path / "ü")],
    ]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_command_fails_on_an_encoding(
    commands: list[list[str]], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for arguments in commands:
        for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        assert ended.value.code in (0, None, 2)
        out = sys.stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        said = sys.stderr.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert "internal error" not in said
        assert "…" not in out
        if "--json" not in arguments:
            assert max(map(len, out.splitlines()), default=0) <= 60
        if encoding == "ascii":
            assert out.isascii()


def keys(values: Any) -> set[str]:
    """All keys of nested JSON, but those that are names of layers or sizes."""
    if isinstance(values, dict):
        own = {key for key in values if key not in ("first", "second") and not key.isdigit()}
        return own.union(*map(keys, values.values()))
    return set().union(*map(keys, values)) if isinstance(values, list) else set()


def test_keys_of_json_are_snake_case(drlora: Any, run_dir: Path, model: Path) -> None:
    printed = [
        drlora("plan", model, "--num-experts", "8", "--json").json,
        drlora("replay", run_dir, "--policies", "all", "--against", run_dir, "--json").json,
        drlora("report", run_dir, "--json").json,
    ]
    found = keys(printed)
    assert {"mean_rank", "units_placed", "total_variation", "peft_transient"} <= found
    assert [key for key in found if not re.fullmatch("[a-z0-9_]+", key)] == []


def test_lines_of_a_pipe_are_whole(drlora: Any, run_dir: Path, model: Path) -> None:
    plan = drlora("plan", model, "--num-experts", "8").out
    assert "7,168 LoRA parameters per rank and expert\n" in plan
    for text in (plan, drlora("replay", run_dir, "--policies", "all").out):
        assert all(line == line.rstrip() for line in text.splitlines())
        assert "no room for" not in text
