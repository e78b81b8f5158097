"""Wrong input to plan, replay and report: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

from drlora_core.cli import plan as command
from tests.bad_files import check_refused, write_all
from tests.core import recorded

PLAN = {
    "none.json": "No such file or directory: none.json",
    "./none": "No such file or directory: none",
    "folder": "No such file or directory: folder/config.json",
    "empty.json": "empty.json is not JSON: ",
    "truncated.json": "truncated.json is not JSON: ",
    "list.json": "list.json is a JSON list, not a model's configuration",
    "number.json": "number.json is a JSON int, not a model's configuration",
    "binary.json": "binary.json is not JSON: ",
    "deep.json": "deep.json is not JSON: ",
    "nan.json": "num_experts is nan; accepted: whole numbers from 1",
    "negative.json": "num_experts is -4; accepted: whole numbers from 1",
    "huge.json": "accepted: at most 400",
    "good.json -s gama=1": "no such field; did you mean 'gamma'?",
    "good.json -s gamma=NaN": "gamma: must be a finite number",
    "good.json -s gamma=1e999": "gamma: must be a finite number",
    "good.json -s r_init=-1": "r_init: must be at least 0, got -1",
    "good.json -s growth_end=9999999999999": "growth_end: must be at most",
    "good.json -s growth_end=999999999 -s growth_interval=1": "growth events; accepted: at most",
    "good.json --allocator list.json": "--allocator list.json: must be a valid dictionary",
    "good.json --allocator folder": "Is a directory: folder",
    "good.json --steps 0": "--steps: ",
    "good.json --steps 100 --allocator allocator.json": "leave one out",
    "good.json --steps 100 --timetable erly": "early, late; did you mean 'early'?",
    "good.json --steps 100 -s warmup_steps=200": "no growth event",
    "good.json --timetable late": "--timetable late needs --steps",
    "good.json --r-max 8 -s r_max=9": "--r-max and --set r_max: give one of them",
    "good.json --r-max 1000000000": "r_max: must be at most 100,000",
    "good.json --r-target 99": "r_target 99 > r_max 32",
    "good.json --tokens 0": "--tokens: ",
    "good.json --hidden-size -3": "--hidden-size: ",
    "good.json --moe-layers 0": "--moe-layers: ",
    "good.json --moe-layers 100000": "100000 MoE layers are given",
    "good.json --num-experts 99999999999": "accepted: whole numbers from 1 to",
    "good.json --kernel grupd": "did you mean 'grouped'?",
}
REPLAY = {
    "none": "there is no recording at",
    "none.npz": "No such file or directory: none.npz",
    "folder": "folder holds no recording",
    "folder.npz": "Is a directory: folder.npz",
    "empty.json": "empty.json",
    "empty.npz": "empty.npz is not a routing trace",
    "binary.npz": "binary.npz is not a routing trace",
    "nan.npz": "nan",
    "negative.npz": "-1",
    "flat.npz": "accepted: [steps, layers, experts]",
    "damaged": "damaged",
    "headless": "headless",
    "run --processes 0": "--processes: ",
    "run --processes -3": "--processes: ",
    "run --policies greedi": "no policy 'greedi'; did you mean 'greedy'?",
    "run --policies prune": "every rank dimension",
    "run --against trace.npz": "the replays have different layers",
    "run --importance twos --against trace.npz": "accepted: 'ones' or 'sampled'",
    "run -s r_max=1000000000": "r_max: must be at most 100,000",
    "run -s gamma": "write NAME=VALUE",
    "run -s r_tarrget=9": "did you mean 'r_target'?",
    "run --allocator truncated.json": "--allocator truncated.json: Invalid JSON",
}
REPORT = {
    "none": "there is no recording at",
    "none.npz": "No such file or directory: none.npz",
    "folder": "folder holds no recording",
    "empty.json": "empty.json",
    "binary.npz": "binary.npz is not a routing trace",
    "nan.npz": "nan",
    "damaged": "damaged",
    "headless": "headless",
    "run -o taken.html": "'taken.html' exists; use another --output",
    "run -o folder": "'folder' exists; use another --output",
    "run --json -o taken.html": "'taken.html' exists; use another --output",
    "run -o taken.html/deep/page.html": "'taken.html' is a file",
    "run --outptu x": "no such option --outptu; did you mean --output?",
}
CASES = [
    (name, line, message)
    for name, lines in {"plan": PLAN, "replay": REPLAY, "report": REPORT}.items()
    for line, message in lines.items()
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad files, which no command may change."""
    folder = tmp_path_factory.mktemp("bad")
    write_all(folder)
    good = {"model_type": "olmoe", "num_experts": 8, "num_hidden_layers": 2, "hidden_size": 8}
    (folder / "good.json").write_text(json.dumps(good | {"intermediate_size": 8}))
    (folder / "allocator.json").write_text(recorded.config().model_dump_json())
    recorded.record(folder / "run")
    ones, tokens = np.ones((20, 2, 8)), np.ones(20, dtype=int)
    for name, sums in {"trace": ones, "nan": np.nan * ones, "negative": -ones, "flat": 1}.items():
        np.savez(folder / f"{name}.npz", weight_sum=sums, tokens=tokens)
    for name in ("damaged", "headless"):
        shutil.copytree(folder / "run", folder / name)
    (segment, *_) = sorted((folder / "damaged").glob("*.npz"))
    segment.write_bytes(segment.read_bytes()[:-40])
    (folder / "headless" / "recording.json").write_text("{")
    return folder


@pytest.mark.parametrize(("name", "line", "message"), CASES)
def test_wrong_input_is_one_sentence(
    name: str,
    line: str,
    message: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(command, "_load_reader", lambda: None)  # without Transformers
    check_refused(capsys, files, [name, *line.split()], message)


def test_a_folder_that_cannot_be_written(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.chdir(files)
    monkeypatch.setattr(Path, "touch", refuse)  # root may write everywhere
    for line, file in (
        (["run"], str(files / "report.html")),  # beside the recording
        (["run", "-o", "page.html"], "page.html"),
        (["run", "--json", "-o", "values.json"], "values.json"),
    ):
        check_refused(capsys, files, ["report", *line], f"Permission denied: {file}\n")
