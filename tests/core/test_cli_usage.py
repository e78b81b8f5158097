"""What every command has: help, versions, completion, and a hint at what was meant."""

from __future__ import annotations

import enum
import importlib.metadata
import logging
import re
import subprocess
import sys
from typing import Annotated, Any

import pytest

pytest.importorskip("typer")

from drlora_core.cli import app as application
from drlora_core.cli import usage

FINETUNE = "drlora_torch.cli:register"


@pytest.fixture(params=["--help", "-h"])
def help_option(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_help_has_a_short_form(drlora: Any, help_option: str) -> None:
    for command in ([], ["plan"], ["replay"], ["report"]):
        shown = drlora(*command, help_option)
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.startswith(f"Usage: {' '.join(['drlora', *command])} ")
    assert drlora().out == drlora("--help").out


def test_versions_come_from_metadata(drlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"drlora": "1.2", "numpy": "3.4", "torch": "5.6"}

    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(application.platform, "python_version", lambda: "3.9")
    assert drlora("--version").out.splitlines() == [
        "drlora 1.2",
        "python 3.9",
        "numpy 3.4",
        "torch 5.6",
        "transformers not installed",
    ]


def test_completion_is_typers(drlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = drlora("--show-completion", "bash")
    assert shown.code == 0
    assert "_DRLORA_COMPLETE" in shown.out
    assert "--install-completion" in drlora("--help").out


MISTAKES = {
    "plan --token 9": "no such option --token; did you mean --tokens? See drlora plan --help",
    "plan --base_dtype float32": "no such option --base_dtype; did you mean --base-dtype? See",
    "plan x --R-Max=9": "no such option --R-Max; did you mean --r-max? See",
    "plan x --rank 9": "no such option --rank; did you mean --r-target? See",
    "plan --max-steps 9": "no such option --max-steps; did you mean --steps? See",
    "plan --config x": "no such option --config; did you mean --allocator? See",
    "plan --model x": "no such option --model; MODEL is given without the name of an option; see",
    "plan x --lr 1": "no such option --lr; see drlora plan --help",
    "replay x -workers 3": "no such option -workers; did you mean --processes? See",
    "report x --output-dir y": "no such option --output-dir; did you mean --output? See",
    "plan": "missing argument 'MODEL'; see drlora plan --help",
    "plan a b": "unexpected extra argument",
    "plan a --tokens": "option '--tokens' requires an argument; see drlora plan --help",
    "plan a --tokens x": "--tokens: ",
    "plan a --tokens 1.5": "--tokens: ",
    "plann a": "no such command plann; did you mean plan? See drlora --help",
    "plan a --steps 0": "--steps: ",
    "zzz": "no such command zzz; see drlora --help",
    "--versoin": "no such option --versoin; did you mean --version? See drlora --help",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(drlora: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    result = drlora(*line.split())
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("drlora: ")
    assert MISTAKES[line] in result.err
    assert result.err.count("\n") == 1
    assert "Value error" not in result.err
    assert "Input should" not in result.err


@pytest.mark.parametrize("words", [["--steps", "0"], ["--steps=0"]])
def test_a_number_out_of_range_is_named(drlora: Any, words: list[str]) -> None:
    said = drlora("plan", "a", *words).err
    accepted = (
        "must be at least 1, got 0|0 is not in the range 1<=x<=1000000000"  # the oldest typer
    )
    assert re.search(f"--steps: ({accepted}); see", said)


def test_a_command_that_is_not_available_has_near_misses(drlora: Any) -> None:
    missing = ["the commands of x, because of the missing library yaml"]
    assert usage._no_such_command("evalute", ["plan"], missing) == (
        "no such command evalute; did you mean evaluate? Not available here: " + missing[0]
    )
    assert usage._no_such_command("push", ["plan"], missing) == (
        "no such command push; not available here: " + missing[0]
    )
    assert usage._no_such_command("plna", ["plan"], missing).endswith("; did you mean plan?")


def test_the_other_commands_are_those_of_torch() -> None:
    pytest.importorskip("torch")
    from drlora_torch.cli import register

    app = application.typer.Typer()
    register(app)
    assert {str(each.callback.__name__) for each in app.registered_commands if each.callback} == {
        *usage.OTHERS
    }
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_long_choices_are_folded(drlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("plan", "finetune", "push"):
        lines = drlora(command, "--help").out.splitlines()
        assert [line for line in lines if len(line) > 60] == []


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("lr", ["learning-rate", "layout"], "learning-rate"),
        ("num-train-epochs", ["epochs", "steps"], "epochs"),
        ("bs", ["batch-size"], "batch-size"),
        ("gradient-accumulation-steps", ["accumulation", "steps"], "accumulation"),
        ("output-dir", ["output"], "output"),
        ("max-seq-length", ["max-length"], "max-length"),
        ("lora-r", ["r-init", "r-target"], "r-target"),
        ("lora-r", ["rank"], "rank"),
        ("lora-alpha", ["alpha"], "alpha"),
        ("load-in-4bits", ["load-in-4bit"], "load-in-4bit"),
        ("lr", ["tokens"], None),
    ],
)
def test_habits_of_other_tools(word: str, known: list[str], meant: str | None) -> None:
    assert next(iter(usage.meanings(word, known)), None) == meant


def test_a_wrong_option_of_finetune_imports_no_torch() -> None:
    pytest.importorskip("torch")
    code = (
        "import sys, atexit; from drlora_core.cli import main; "
        "atexit.register(lambda: print(sorted({'torch', 'transformers'} & set(sys.modules)))); "
        "main(['finetune', '--lr', '1e-3'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    hint = "no such option --lr; did you mean --learning-rate? See drlora finetune --help"
    assert done.stderr == f"drlora: {hint}\n"
    assert done.stdout == "[]\n"


def let_register(monkeypatch: pytest.MonkeyPatch, register: Any) -> None:
    """Let another package register commands."""
    entry = importlib.metadata.EntryPoint("torch", "other:register", application.ENTRY_POINTS)
    monkeypatch.setattr(type(entry), "load", lambda self: register)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry])


@pytest.mark.parametrize("library", application.EXTRAS)
def test_a_missing_library_is_named(
    drlora: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(app: Any) -> None:
        def train() -> None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)

        def stop() -> None:
            raise KeyboardInterrupt

        app.command()(train)
        app.command()(stop)

    let_register(monkeypatch, register)
    result = drlora("train")
    assert result.code == 2
    assert result.err == (
        f"drlora: train needs {library}, which is not installed: "
        f'pip install -c constraints.txt "drlora[{application.EXTRAS[library]}]"\n'
    )
    assert drlora("stop").code == 130


def test_panels_are_sections_of_the_help(drlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in help texts are no markup, and every word is there on 60 columns."""
    import typer

    steps_option = typer.Option("--steps", help="Steps. [x; at least 1]", rich_help_panel="Length")

    def register(app: Any) -> None:
        def train(steps: Annotated[int | None, steps_option] = None, output: str = "x") -> None:
            raise AssertionError((steps, output))

        train.__annotations__["steps"] = Annotated[int | None, steps_option]
        app.command()(train)
        app.command("other")(lambda: None)

    let_register(monkeypatch, register)
    monkeypatch.setenv("COLUMNS", "60")
    lines = drlora("train", "--help").out.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["Length:", "Options:"]
    assert any("Steps. [x; at least 1]" in line for line in lines)
    assert max(map(len, lines)) <= 60


class Color(str, enum.Enum):
    """Choices of an option."""

    RED, GREEN = "red", "green"


@pytest.mark.parametrize(
    ("given", "hint"), [("grean", "; did you mean 'green'?"), ("zzz", "; see")]
)
def test_a_wrong_choice_has_near_misses(
    drlora: Any, given: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(app: Any) -> None:
        def paint(color: Color = Color.RED) -> None:
            raise AssertionError(color)

        paint.__annotations__["color"] = Color
        app.command()(paint)
        app.command("other")(lambda: None)

    let_register(monkeypatch, register)
    result = drlora("paint", "--color", given)
    assert result.code == 2
    assert f"--color: '{given}' is not one of 'red', 'green'{hint}" in result.err


def test_a_command_keeps_its_own_help_and_hidden_options_are_not_told(
    drlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    class Own(typer.core.TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            formatter.write("my own help")

    secret = typer.Option(hidden=True)

    def register(app: Any) -> None:
        def train(secret: int = secret, steps: int = 3) -> None:
            raise AssertionError((secret, steps))

        app.command()(train)
        app.command("other", cls=Own)(lambda: None)

    let_register(monkeypatch, register)
    assert drlora("other", "--help").out.strip() == "my own help"
    shown = drlora("train", "--help").out
    assert "--steps" in shown
    assert "secret" not in shown
