"""``--processes``: what is refused before anything starts, and what is started otherwise."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from drlora_core.cli import main
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder, job, launch, worker
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.sharding import Sharding
from tests.finetune.test_options import OTHER

Calls = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, no GPU, and no process is started by accident."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("torch.distributed.run.run", lambda _: pytest.fail("was started"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What this process would train."""
    calls: Calls = []

    def run(
        options: FinetuneOptions,
        output: Path,
        *_: Any,
        compare: Any,
        resume: bool,
        sharding: Sharding,
    ) -> None:
        calls.append((options, output, compare, resume, sharding))

    monkeypatch.setattr(job, "run", run)
    return calls


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What this process would launch."""
    calls: Calls = []

    def note(*call: Any) -> None:
        calls.append(call)
        raise SystemExit(0)

    monkeypatch.setattr(launch, "launch", note)
    return calls


def ended(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *arguments])
    return stopped.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert ended(*arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("drlora: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("processes", [[], ["--processes", "1"]])
def test_one_process_is_this_one(processes: list[str], trained: Calls, launched: Calls) -> None:
    assert not ended("m", "d.jsonl", *processes)
    assert len(trained) == 1
    assert launched == []


def test_fewer_than_one_process_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--processes", "0") == 2
    assert "--processes: " in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["RANK", "TORCHELASTIC_RUN_ID"])
def test_inside_a_launcher_only_its_own_number_is_accepted(
    variable: str,
    trained: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for other in ("1", "4"):
        said = refused(capsys, "m", "d.jsonl", "--processes", other)
        assert f"--processes {other} inside a launcher that has started 2" in said
        assert "use --processes 2" in said
    assert trained == []
    assert not ended("m", "d.jsonl", "--processes", "2")
    assert not ended("m", "d.jsonl")
    assert len(trained) == 2


def test_more_processes_than_gpus_are_refused(
    launched: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    said = refused(capsys, "m", "d.jsonl", "--processes", "4")
    assert "--processes 4" in said
    assert "this machine has 3" in said
    assert launched == []
    ended("m", "d.jsonl", "--processes", "3")
    assert [processes for processes, *_ in launched] == [3]


def test_other_options_are_refused_before_the_processes_start(
    tmp_path: Path, launched: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs DATA" in refused(capsys, "m", "--processes", "2")
    bad = ["--r-target", "99", "--processes", "2"]
    assert "r_target 99 > r_max" in refused(capsys, *bad)
    said = refused(capsys, "--output", str(tmp_path), "--processes", "2")
    assert f"output folder {str(tmp_path)!r} exists" in said
    assert "has no options.json" in refused(capsys, "--resume", str(tmp_path), "--processes", "2")
    options = FinetuneOptions(model="m", data="d.jsonl", batch_size=3)
    folder.create(tmp_path / "run", folder.SavedRun(options=options, processes=2))
    said = refused(capsys, "--resume", str(tmp_path / "run"), "--processes", "4")
    assert "has 6 rows, which 4 processes cannot share" in said
    assert launched == []


def test_the_processes_read_what_the_user_gave(launched: Calls, trained: Calls) -> None:
    """Every option survives the way through the command line of the processes."""
    arguments = [f"--{n.replace('_', '-')}={v}" for n, v in OTHER.items() if v is not True]
    arguments = [word for word in arguments if not word.startswith(("--model=", "--data="))]
    arguments += [f"--{n.replace('_', '-')}" for n, v in OTHER.items() if v is True]
    arguments += ["--compare", "uniform", "--output", "-my run"]
    ended("--processes", "3", *arguments, "--", "-m", "-d.jsonl")
    ended("--processes", "2")
    (three, words, output, _), (two, own_words, own_output, _) = launched
    assert (three, output, two) == (3, Path("-my run"), 2)
    assert str(own_output).startswith("runs")
    assert [word for word in words if "processes" in word] == []
    for each in (words, own_words):
        with pytest.raises(SystemExit):
            main(each)
    ended()
    full, own, plain = trained
    options = FinetuneOptions(**{**OTHER, "model": "-m", "data": "-d.jsonl"})
    assert full == (options, Path("-my run"), "uniform", False, Sharding())
    assert own == (plain[0], own_output, None, False, Sharding())  # the clock is read once


def test_a_resume_takes_its_options_from_the_folder(
    tmp_path: Path, launched: Calls, trained: Calls
) -> None:
    options = FinetuneOptions(model="m", data="d.jsonl")
    folder.create(tmp_path / "run", folder.SavedRun(options=options, compare="uniform"))
    ended("--resume", str(tmp_path / "run"), "--processes", "2", "--fsdp-size", "2")
    ((processes, words, output, sharding),) = launched
    assert (processes, output, sharding) == (2, tmp_path / "run", Sharding(fsdp_size=2))
    with pytest.raises(SystemExit):
        main(words)
    assert trained == [(options, tmp_path / "run", "uniform", True, sharding)]


def test_torchrun_gets_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("torch.distributed.run.run", seen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    with pytest.raises(SystemExit) as stopped:
        launch.launch(3, ["finetune", "--output=run"], Path("run"), Sharding())
    assert stopped.value.code == 0
    (found,) = seen
    assert (found.standalone, found.nproc_per_node, found.module) == (True, "3", True)
    assert found.training_script == worker.__name__
    assert found.training_script_args == ["finetune", "--output=run"]
    assert os.environ["OMP_NUM_THREADS"] == "5"  # the user's own
    for processes, threads in ((3, "2"), (9, "1")):
        monkeypatch.delenv("OMP_NUM_THREADS")
        launch.set_environment(processes)
        assert os.environ["OMP_NUM_THREADS"] == threads


def failure(tmp_path: Path, rank: int, code: int, said: str = "", at: float = 0) -> ProcessFailure:
    file = tmp_path / f"{rank}.json"
    if said:
        file.write_text(json.dumps({"message": said, "timestamp": at}))
    made = ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file=str(file))
    if not said:
        made.timestamp = int(at)
    return made


CASES = {
    "one refuses, the other is ended": ([(2, "no model", 5.2), (-15, "", 5)], "no model", 2),
    "both refuse": ([(2, "no model", 5.2), (2, "no model", 5.3)], "no model", 2),
    "the first to fail counts": ([(1, "lost", 5.3), (1, "bug", 5.2)], "bug", 1),
    "one is killed": (
        [(1, "lost", 5.99), (-9, "", 6)],
        "process 2 of 2 was killed by signal 9 (SIGKILL)",
        137,
    ),
    "one says nothing": ([(-15, "", 5), (3, "", 5)], "process 2 of 2 ended with exit code 3", 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_is_one_sentence_with_the_exit_code_of_its_process(
    case: str,
    begun: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    processes, sentence, code = CASES[case]
    failures = {r: failure(tmp_path, r, *each) for r, each in enumerate(processes)}

    def run(_: Any) -> None:
        raise ChildFailedError("worker", failures)

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    if begun:
        options = FinetuneOptions(model="m", data="d.jsonl")
        folder.create(tmp_path / "run", folder.SavedRun(options=options))
    with pytest.raises(SystemExit) as stopped:
        launch.launch(2, [], tmp_path / "run", Sharding(fsdp_size=2))
    assert stopped.value.code == code
    said = capsys.readouterr().err.strip()
    goes_on = begun and code > 128
    hint = f"; go on with: drlora finetune --resume {tmp_path / 'run'} --processes 2 --fsdp-size=2"
    assert said == f"drlora: {sentence}{hint if goes_on else ''}"


def test_a_signal_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    with pytest.raises(SystemExit) as stopped:
        launch.launch(2, [], tmp_path, Sharding())
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "drlora: stopped by SIGTERM\n"


def test_a_process_tells_torchrun_and_not_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(worker.ERROR_FILE, str(tmp_path / "error.json"))
    worker.tell_launcher("no model")
    assert capsys.readouterr().err == ""
    made = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert launch.describe_failure(ChildFailedError("", {0: made}), 2) == ("no model", 2)
    monkeypatch.delenv(worker.ERROR_FILE)
    worker.tell_launcher("no model")
    assert capsys.readouterr().err == "drlora: no model\n"


@pytest.mark.parametrize(
    ("begun_with", "processes", "batch", "accumulation"),
    [(1, 1, 6, 2), (2, 2, 6, 2), (1, 2, 6, 1), (1, 4, 3, 1), (2, 1, 6, 4), (2, 3, 4, 2)],
)
def test_a_step_keeps_its_rows_in_other_processes(
    begun_with: int, processes: int, batch: int, accumulation: int
) -> None:
    begun = FinetuneOptions(model="m", data="d.jsonl", batch_size=6, accumulation=2)
    shared = begun.shared_by(processes, begun_with)
    assert (shared.batch_size, shared.accumulation) == (batch, accumulation)
    assert batch * accumulation * processes == 12 * begun_with
    with pytest.raises(RunError, match="rows, which 5 processes cannot share"):
        begun.shared_by(5, begun_with)
