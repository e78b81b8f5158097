"""The console script: what it prints, and one sentence for every error of the user's."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import DRLoRAError
from drlora_core.model_shape import LayerShape, ModelShape
from drlora_core.recording import Recording
from tests.core import recorded

typer = pytest.importorskip("typer")

from drlora_core.cli import app as application  # noqa: E402
from drlora_core.cli import common, main  # noqa: E402


def test_help_names_the_commands(drlora: Any) -> None:
    result = drlora("--help")
    assert result.code == 0
    for name in ("plan", "replay", "report"):
        assert name in result.out
    for name in ("plan", "replay", "report"):
        assert drlora(name, "--help").code == 0
    assert "cannot know how they would" in " ".join(drlora("replay", "--help").out.split())


def test_plan(drlora: Any, model: Path) -> None:
    result = drlora("plan", model, "--set", "growth_end=4200", "-s", "r_max=64")
    assert result.code == 0
    assert "16 MoE layers of 16, 64 experts each, 1,024 in all" in result.out
    assert "is met at step 4200" in result.out
    assert "8 events in the middle are left out" in result.out
    values = drlora("plan", model, "--json", "--dtype", "bfloat16").json
    assert values["storages"][0]["weights"] == 2 * 16 * 64 * 16 * 7168
    assert [event["quota"] for event in values["timetable"]["64"]] == [51, 51, 51, 51, 52] * 2
    assert values["steps"] is None
    assert "training of 4,200 steps or more; --steps N shows" in result.out
    never = drlora("plan", model, "--set", "quota=1")
    assert "is never met with this quota" in never.out
    assert "is met from the start" in drlora("plan", model, "--set", "policy=uniform").out
    moving = drlora("plan", model, "--set", "policy=move", "-s", "r_init=16").out
    assert "is met from the start" in moving
    assert "most moved" in moving
    assert "most moved" not in result.out


def test_plan_with_an_allocator_file(drlora: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "allocator.json"
    file.write_text(recorded.config().model_dump_json())
    values = drlora("plan", model, "--allocator", file, "--set", "gamma=2", "--json").json
    assert values["config"] == recorded.config(gamma=2.0).model_dump(mode="json")


def test_replay_of_a_run_repeats_it(drlora: Any, run_dir: Path) -> None:
    result = drlora("replay", run_dir)
    assert result.code == 0
    assert "decisions identical to the recorded run: yes" in result.out
    assert "cannot know how they would have changed" in result.out
    values = drlora("replay", run_dir / "recording", "--json").json
    assert values["identical_to_recorded"] is True
    assert [event["step"] for event in values["events"]] == [8, 12, 16]
    assert sum(values["final_ranks"]["first"]) == 24


def test_replay_says_what_the_reader_found(drlora: Any, tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    engine.state_dict()  # which writes the steps
    shown = drlora("replay", tmp_path / "run")
    engine.record_to(None)
    assert shown.code == 0
    assert shown.out.startswith("note: ")
    assert "not closed" in shown.out.splitlines()[0]


def test_a_run_recorded_in_zarr_is_refused(drlora: Any, tmp_path: Path) -> None:
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording" / "zarr.json").write_text("{}")
    result = drlora("replay", tmp_path)
    assert result.code == 2
    assert "recording in Zarr, which this version no longer reads: record again" in result.err
    assert result.err.count("\n") == 1


def test_replay_compares_policies_and_recordings(drlora: Any, run_dir: Path) -> None:
    everything = drlora("replay", run_dir, "--policies", "all", "--against", run_dir, "--json").json
    assert [row["policy"] for row in everything["policies"]] == [
        "greedy",
        "rescored",
        "proportional",
        "uniform",
        "random",
    ]
    assert "importance of every rank dimension" in everything["policies_left_out"]["prune"]
    assert everything["against"]["summary"]["overlap"] == 1.0
    assert "policy prune is left out: " in drlora("replay", run_dir, "--policies", "all").out
    shown = drlora("replay", run_dir, "--policies", "greedy,random", "--against", run_dir)
    assert "Policies on these statistics" in shown.out
    assert "total variation" in shown.out
    other = drlora("replay", run_dir, "--set", "gamma=0", "--json").json
    assert other["own_configuration"] is False
    assert other["identical_to_recorded"] is None


def test_replay_of_a_prune_run_under_all_policies(drlora: Any, tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", policy="prune", r_init=8)
    values = drlora("replay", tmp_path / "run", "--policies", "all", "--json").json
    assert values["identical_to_recorded"] is True
    assert {row["policy"]: row["mean_rank"] for row in values["policies"]}["prune"] == 4.0
    assert len(values["policies"]) == 6
    assert list(values["policies_left_out"]) == ["move"]
    assert "it used policy 'prune'" in values["policies_left_out"]["move"]


def test_replay_of_a_move_run_under_all_policies(drlora: Any, tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", policy="move", r_init=4, move_share=1.0)
    values = drlora("replay", tmp_path / "run", "--policies", "all", "--json").json
    assert values["identical_to_recorded"] is True
    placed, cut = (
        [event[f"units_{what}"] for event in values["events"]] for what in ("placed", "cut")
    )
    assert placed == cut  # at the budget from the start
    assert sum(cut) > 0
    assert {row["policy"]: row["mean_rank"] for row in values["policies"]}["move"] == 4.0
    assert list(values["policies_left_out"]) == ["prune"]
    assert "it used policy 'move'" in values["policies_left_out"]["prune"]


def test_replay_of_a_trace(drlora: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sums = rng.random((40, 9, 8)).astype(np.float32)
    np.savez(tmp_path / "trace.npz", weight_sum=sums, tokens=np.full(40, 10))
    result = drlora("replay", tmp_path / "trace.npz", "--importance", "sampled")
    assert result.code == 0
    assert "1 more layers; --json has all" in result.out
    values = drlora("replay", tmp_path / "trace.npz", "--json").json
    assert len(values["events"]) == 10
    assert values["diagnosis"]["findings"]


def test_a_changed_record_is_told(drlora: Any, run_dir: Path, tmp_path: Path) -> None:
    recording = Recording.open(run_dir / "recording")
    routing = recording.routing.copy()
    routing[2, 0] = 1e6
    vars(recording)["routing"] = routing
    recording.save(tmp_path / "changed")
    result = drlora("replay", tmp_path / "changed")
    assert "decisions identical to the recorded run: no" in result.out
    assert "first difference (recorded, replayed): step 8, layer 'first'" in result.out


def test_report(drlora: Any, run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    result = drlora("report", run_dir, "--output", tmp_path / "page.html")
    assert result.code == 0
    assert "wrote " in result.out
    page = (tmp_path / "page.html").read_text()
    assert "repeats the run&#39;s decisions exactly" in page
    assert "<h2>Checks</h2>" in page
    assert not re.search(r'<(script|link|img)\b[^>]*\b(src|href)="http', page)  # not in the scripts
    assert drlora("report", run_dir).code == 0
    assert (run_dir / "report.html").exists()
    values = drlora("report", run_dir, "--json").json
    assert len(values["events"]) == 3
    written = drlora("report", run_dir, "--json", "-o", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == values
    assert written.out == f"wrote {tmp_path / 'report.json'}\n"


def test_report_of_a_trace(drlora: Any, tmp_path: Path) -> None:
    """The same ten events as replay has."""
    pytest.importorskip("plotly")
    trace = tmp_path / "trace.npz"
    sums = np.random.default_rng(0).random((40, 2, 8))
    np.savez(trace, weight_sum=sums, tokens=np.full(40, 10))
    values = drlora("report", trace, "--json").json
    replayed = drlora("replay", trace, "--json").json
    assert [event["step"] for event in values["events"]] == list(range(13, 41, 3))
    assert values["final_ranks"] == replayed["final_ranks"]
    assert drlora("report", trace).code == 0
    assert "<bdi>trace.npz</bdi>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{tmp}/none.json"], "No such file or directory: "),
        (["plan", "{model}", "--set", "r_target=99"], "r_target 99 > r_max 32"),
        (["plan", "{model}", "--set", "r_init=-1"], "r_init: must be at least 0, got -1"),
        (["plan", "{model}", "--set", "r_tarrget=9"], "did you mean 'r_target'?"),
        (["plan", "{model}", "--set", "gamma"], "write NAME=VALUE"),
        (["plan", "{model}", "--dtype", "int8"], "--dtype int8: accepted: float32"),
        (["plan", "{model}", "--num-experts", "-1"], "--num-experts: "),
        (["plan", "{model}", "--allocator", "{model}"], "no field 'model_type'"),
        (["replay", "{tmp}"], "holds no recording"),
        (["replay", "{tmp}/x"], "there is no recording at"),
        (["replay", "{run}", "--policies", "greedi"], "did you mean 'greedy'?"),
        (["replay", "{run}", "--set", "policy=prune", "-s", "r_init=8"], "every rank dimension"),
        (["replay", "{trace}", "--importance", "two"], "accepted: 'ones' or 'sampled'"),
        (["replay", "{trace}", "--set", "policy=prune", "-s", "r_init=32"], "rank dimension"),
    ],
)
def test_an_error_is_one_sentence_and_exit_code_2(
    drlora: Any, arguments: list[str], message: str, model: Path, run_dir: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "t.npz", weight_sum=np.ones((20, 2, 8)), tokens=np.ones(20, dtype=int))
    places = {"tmp": tmp_path, "model": model, "run": run_dir, "trace": tmp_path / "t.npz"}
    result = drlora(*(argument.format(**places) for argument in arguments))
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


def test_several_recordings_in_a_directory_are_refused(drlora: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        recorded.record(tmp_path / name, steps=2)
    result = drlora("replay", tmp_path)
    assert result.code == 2
    assert "several recordings (a, b)" in result.err


def pretend(monkeypatch: pytest.MonkeyPatch, register: Any) -> None:
    """Let one entry point exist, that loads to (or raises) this."""

    class Entry:
        name, value = "torch", "other.cli:register"

        def load(self) -> Any:
            if isinstance(register, Exception):
                raise register
            return register

    def entry_points(group: str) -> list[Entry]:
        return [Entry()] if group == application.ENTRY_POINTS else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def other_commands(app: Any) -> None:
    """Add commands of another package."""

    def fails(kind: str) -> None:
        raise {"user": DRLoRAError("too\nbad"), "ours": RuntimeError("a bug")}[kind]

    app.command()(fails)


def test_plan_uses_a_reader_of_another_package(
    drlora: Any, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    layer = LayerShape(0, 4, {"up_proj": (2, 3)})

    class Missing:
        def load(self) -> Any:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

    class Reader:
        def load(self) -> Any:
            return lambda source: ModelShape(f"read from {source}", 1, (layer,), 99)

    def entry_points(group: str) -> list[Any]:
        return [Missing(), *readers] if group == "drlora.shapes" else []

    readers: list[Any] = []
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert "olmoe: 16 MoE layers of 16" in drlora("plan", model).out
    missing = drlora("plan", "owner/model")
    assert "No such file or directory: owner/model" in missing.err
    readers.append(Reader())
    assert f"read from {model}: 1 MoE layers" in drlora("plan", model).out.replace("\n", "")
    assert "read from owner/model: 1 MoE layers" in drlora("plan", "owner/model").out
    assert "olmoe: 16 MoE layers" in drlora("plan", model, "--gated").out


def test_registered_commands_have_the_same_errors(
    drlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, other_commands)
    user = drlora("fails", "user")
    assert (user.code, user.err) == (2, "drlora: too bad\n")
    ours = drlora("fails", "ours")
    assert ours.code == 1
    assert ours.err.startswith("drlora: internal error: RuntimeError: a bug")
    assert ours.err.count("\n") == 1
    monkeypatch.setenv("DRLORA_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fails", "ours"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "missing library torch"),
        (AttributeError("no register"), "AttributeError: no register"),
    ],
)
def test_commands_that_cannot_be_loaded_are_named(
    drlora: Any, monkeypatch: pytest.MonkeyPatch, model: Path, error: Exception, reason: str
) -> None:
    pretend(monkeypatch, error)
    assert drlora("plan", model).code == 0
    assert reason in " ".join(drlora("--help").out.split())
    unknown = drlora("finetune")
    assert unknown.code == 2
    assert reason in unknown.err
    assert unknown.err.startswith("drlora: no such command finetune; not available here: ")
    assert unknown.err.count("\n") == 1


def unreadable(app: Any) -> None:
    """Add a command whose signature typer cannot read."""

    def strange(value: type[int] | complex) -> None:
        raise AssertionError(value)

    app.command()(strange)


def test_commands_with_unreadable_signatures_do_not_break_ours(
    drlora: Any, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    pretend(monkeypatch, unreadable)
    assert drlora("plan", model).code == 0
    assert "Not available here: the commands of other.cli" in drlora("--help").out


def test_the_torch_commands_are_an_entry_point_of_ours() -> None:
    entries = importlib.metadata.entry_points(group=application.ENTRY_POINTS)
    assert (
        importlib.metadata.EntryPoint(
            "torch", "drlora_torch.cli:register", application.ENTRY_POINTS
        )
        in entries
    )


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + name, name=name.split(".")[0])
sys.meta_path.insert(0, Refuse())
from drlora_core.cli import main
main({arguments!r})
"""


def without(blocked: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(blocked=blocked, arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_missing_libraries_are_one_sentence(model: Path, run_dir: Path, tmp_path: Path) -> None:
    no_torch = without({"torch", "transformers"}, "plan", model)
    assert no_torch.returncode == 0, no_torch.stderr
    for blocked, arguments, extra in [
        ({"typer"}, ["plan", model], "cli"),
        ({"rich"}, ["plan", model], "cli"),
        ({"plotly"}, ["report", run_dir, "-o", tmp_path / "x.html"], "report"),
        ({"jinja2"}, ["report", run_dir, "-o", tmp_path / "x.html"], "report"),
        ({"scipy"}, ["replay", run_dir], "cli"),
        ({"torch"}, ["finetune"], "finetune"),
    ]:
        result = without(blocked, *arguments)
        assert result.returncode == 2
        assert f'"drlora[{extra}]"' in result.stderr
        assert result.stderr.count("\n") == 1


def test_importing_the_core_needs_no_extra() -> None:
    code = (
        "import sys, drlora_core; "
        "heavy = {'typer', 'rich', 'plotly', 'scipy', 'jinja2', 'torch', 'drlora_torch'}; "
        "heavy |= {'pandas'}; "
        "heavy &= set(sys.modules); "
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_small_helpers() -> None:
    assert common.format_bytes(1536) == "1.50 KiB"
    assert common.format_bytes(5 * 2**50) == "5120.00 TiB"
