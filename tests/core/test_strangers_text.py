"""Texts of strangers are shown as they are, except for what would steer the terminal."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from rich.text import Text

from drlora_core import Recording
from drlora_core.cli.console import make_console, say
from drlora_core.errors import printable
from tests.core import commands

EVIL = "a\x1b[31mRED\x1b]0;title\x07\x9b2J\x7f\u202e\u2066[red]b[/red]é\u200d"
SHOWN = r"a\u001b[31mRED\u001b]0;title\u0007\u009b2J\u007f\u202e\u2066[red]b[/red]é" + "\u200d"


def steering(text: str) -> set[str]:
    """Characters that steer a terminal."""
    others = {char for char in text if unicodedata.category(char) == "Cc"} - {"\n"}
    return others | {char for char in text if "\u202a" <= char <= "\u202e" or char == "\u2066"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    routing = np.random.default_rng(0).random((250, 4))
    Recording.from_arrays({EVIL: routing, "b": routing}, {EVIL: routing, "b": routing}).save("rec")
    config = {"model_type": EVIL, "num_experts": 8, "num_hidden_layers": 2, "hidden_size": 8}
    config |= {"intermediate_size": 8, "num_experts_per_tok": 2}
    Path("model.json").write_text(json.dumps(config))
    Path("bad.json").write_text(json.dumps(config | {"num_experts": EVIL}))
    header = json.loads(Path("rec/recording.json").read_text())
    Path("damaged").mkdir()
    Path("damaged/recording.json").write_text(json.dumps(header | {"layers": {EVIL: "q"}}))
    return tmp_path


LINES = [
    "replay rec",
    "replay rec --json",
    "replay damaged",
    "report rec",
    "plan model.json",
    "plan bad.json",
    "plan model.json --json",
    f"plan {EVIL}",
    f"plan model.json -s {EVIL}=1",
    f"{EVIL} rec",
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_no_command_passes_control_characters_on(
    line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = commands.call(capsys, *line.split(" "))
    assert result.out + result.err
    assert not steering(result.out + result.err)
    if "--json" in line:
        json.loads(result.out)


def test_a_terminal_gets_the_styles_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = make_console()
    console.file = io.StringIO()
    console.print(Text(EVIL, style="bold"), soft_wrap=True)
    say(EVIL, console)
    shown = console.file.getvalue()
    assert shown.startswith("\x1b[1m")
    assert "\x1b[31m" not in shown
    assert steering(shown) == {"\x1b"}


def test_other_texts_are_as_they_were() -> None:
    assert printable(EVIL) == SHOWN
    for text in ("línea\n\tالعربية", "👩\u200d🔬", "[red]", ""):
        assert printable(text) == text
