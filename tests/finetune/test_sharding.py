"""``--fsdp-size``, ``--ep-size`` and ``--tp-size``: what fits, what is refused, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drlora_core.cli import main
from drlora_torch.errors import ModelError, RunError
from drlora_torch.finetune import folder, job, launch, model, optimizer_state, sharding
from drlora_torch.finetune.recipe import Recipe
from drlora_torch.finetune.sharding import Sharding

FITS = [
    (1, {}),
    (3, {}),
    (2, {"fsdp_size": 2}),
    (2, {"tp_size": 2}),
    (8, {"fsdp_size": 4, "tp_size": 2}),
    (4, {"fsdp_size": 4, "ep_size": 2}),
    (4, {"fsdp_size": 4, "ep_size": 4}),
    (2, {"tp_size": 2, "ep_size": 2}),
    (8, {"fsdp_size": 4, "tp_size": 2, "ep_size": 4}),
]
REFUSED = [
    (4, {"fsdp_size": 2}, ["--fsdp-size 2 times --tp-size 1 is 2", "is 4", "--processes 2"]),
    (1, {"fsdp_size": 2}, ["processes, which is 1", "use --processes 2"]),
    (2, {"fsdp_size": 2, "tp_size": 2}, ["times --tp-size 2 is 4", "use --processes 4"]),
    (2, {"ep_size": 2}, ["--ep-size 2", "add --fsdp-size 2"]),
    (4, {"fsdp_size": 4, "ep_size": 3}, ["--ep-size 3", "(4); use one of 1, 2, 4"]),
    (8, {"fsdp_size": 2, "tp_size": 4, "ep_size": 2}, ["multiple of --tp-size 4", "one of 4, 8"]),
]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "can_share_features", lambda: True)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("processes", "sizes"), FITS)
def test_sizes_that_fit_are_those_of_transformers(processes: int, sizes: dict[str, int]) -> None:
    chosen = Sharding(**sizes)
    chosen.check(processes)
    assert chosen.is_sharded == bool(sizes)
    config = chosen.distributed_config()
    if sizes:
        assert {name: getattr(config, name) for name in sizes} == sizes
        assert chosen.batches(processes) == config.dp_size
    else:
        assert config is None
        assert chosen.batches(processes) == processes


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("processes", "sizes", "words"), REFUSED)
def test_sizes_that_do_not_fit_are_refused(
    processes: int, sizes: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(RunError) as refused:
        Sharding(**sizes).check(processes)
    said = str(refused.value)
    assert [word for word in words if word not in said] == []
    assert "\n" not in said


def test_tensor_parallelism_is_refused_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match=r"--tp-size 2 needs a GPU.* --tp-size 1 with --fsdp-size 2"):
        Sharding(tp_size=2).check(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Sharding(tp_size=2).check(2)


def ended(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *arguments])
    return stopped.value.code


def test_the_command_refuses_before_anything_starts_or_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("was started"))
    monkeypatch.setattr(job, "load_base", lambda *_: pytest.fail("was loaded"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)
    output = ["--output", str(tmp_path / "run")]
    assert ended(*output, "--processes", "4", "--fsdp-size", "2") == 2
    assert "use --processes 2" in capsys.readouterr().err
    assert ended(*output, "--fsdp-size", "2") == 2
    assert "use --processes 2" in capsys.readouterr().err
    assert ended(*output, "--tp-size", "0") == 2
    assert "tp_size: must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("gpus")
def test_the_processes_get_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def note(*call: Any) -> None:
        calls.append(call)
        raise SystemExit(0)

    monkeypatch.setattr(launch, "launch", note)
    monkeypatch.setattr(job, "run", lambda *_, **__: calls.append(_[0].sharding))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)
    sizes = ["--fsdp-size", "2", "--ep-size", "4", "--tp-size", "2"]
    ended("--output", str(tmp_path / "run"), "--processes", "4", *sizes)
    ((_, words, _, chosen),) = calls
    assert chosen == Sharding(fsdp_size=2, ep_size=4, tp_size=2)
    main_arguments = words[1:]
    ended(*main_arguments)
    assert calls[1] == chosen


@pytest.mark.usefixtures("gpus")
def test_a_resume_shares_the_rows_among_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four processes, two and two have the same rows, and a step of six rows can be shared."""
    launched: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda *call: launched.append(call))
    monkeypatch.setattr(job, "run", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)
    recipe = Recipe(model="m", data="d.jsonl", batch_size=3, processes=2)
    folder.create(tmp_path / "run", recipe)
    resumed = ["--resume", str(tmp_path / "run"), "--processes", "4"]
    assert ended(*resumed, "--fsdp-size", "4") == 2
    assert "6 rows, which 4 processes cannot share" in capsys.readouterr().err
    assert launched == []
    assert not ended(*resumed, "--fsdp-size", "2", "--tp-size", "2")
    assert len(launched) == 1
    options = recipe.options
    assert options.shared_by(Sharding(fsdp_size=2, tp_size=2).batches(4), 2) == options


def test_a_model_that_stays_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_load_whole", lambda *_, **__: torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="does not shard Linear with --fsdp-size=2 --ep-size=2"):
        model.load_model("m", sharding=Sharding(fsdp_size=2, ep_size=2))


def test_the_state_of_an_optimizer_survives_other_groups() -> None:
    """The Trainer makes a group for each mesh; the file has those of one process."""
    made = [torch.nn.Parameter(torch.full((2,), float(number))) for number in range(4)]

    def optimizer(*groups: list[int]) -> torch.optim.AdamW:
        named = [{"params": [made[number] for number in group]} for group in groups]
        return torch.optim.AdamW(named, lr=0.1)

    one = optimizer([0, 1, 2], [3])
    for number, parameter in enumerate(made):
        parameter.grad = torch.full((2,), float(number + 1))
    one.step()
    one.param_groups[1]["lr"] = 0.5
    canonical = [made[:3], made[3:]]
    saved = optimizer_state.gather(one, canonical, keep=True)
    assert saved["param_groups"] == one.state_dict()["param_groups"]
    split = optimizer([3], [0, 2], [1])
    optimizer_state.scatter(split, canonical, saved)
    assert [group["lr"] for group in split.param_groups] == [0.5, 0.1, 0.1]
    for parameter in made:
        for key, value in one.state[parameter].items():
            assert torch.equal(split.state[parameter][key], value)
    again = optimizer_state.gather(split, canonical, keep=True)
    assert again["param_groups"] == saved["param_groups"]
    assert again["state"].keys() == saved["state"].keys()
    assert not any(optimizer_state.gather(split, canonical, keep=False)["state"].values())
