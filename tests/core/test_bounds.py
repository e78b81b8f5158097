"""Sizes that would fill memory or time are refused in one short sentence, before allocating."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError, Recording, replay
from drlora_core.bounds import MOST_EXPERTS
from drlora_core.errors import TimetableError, describe_validation_error
from tests.core import recorded

TOO_LARGE: list[tuple[dict[str, Any], str]] = [
    ({"r_max": 40_000_000}, "r_max: must be at most 100,000, got 40000000"),
    ({"r_init": 10**6}, "r_init: must be at most 100,000"),
    ({"r_target": 10**6}, "r_target: must be at most 100,000"),
    ({"growth_end": 10**15}, "growth_end: must be at most 1,000,000,000,000"),
    ({"r_init": 1, "quota": 10**13}, "quota: must be at most"),
    ({"gamma": 1e308}, "gamma: must be at most 50, got"),
    ({"gamma": 10**400}, "gamma: must be a valid number, got 1000"),
    ({"seed": 10**5000}, "seed: must be at most"),
    ({"growth_interval": 1, "growth_end": 10**7}, "9,999,800 growth events; accepted: at most"),
    ({"growth_interval": 1, "growth_end": 10**7, "policy": "uniform"}, "growth events; accepted"),
]


@pytest.mark.parametrize(("fields", "message"), TOO_LARGE)
def test_sizes_have_bounds(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        AllocatorConfig(**fields)
    text = describe_validation_error(error.value)
    assert message in text
    assert len(text) < 250


@pytest.mark.parametrize("name", [name for name, field in AllocatorConfig.model_fields.items()])
def test_no_field_takes_an_endless_number(name: str) -> None:
    """As a number of Python, and of a JSON file."""
    for number in (10**400, 10**40, -(10**400)):
        with pytest.raises(ValidationError, match=name):
            AllocatorConfig(**{name: number})
        with pytest.raises(ValidationError, match=name):
            AllocatorConfig.model_validate_json(json.dumps({name: number}))


@pytest.mark.parametrize("arguments", [{"steps": 10**13}, {"steps": 10**400}])
def test_a_training_has_a_bound_too(arguments: dict[str, int]) -> None:
    with pytest.raises(TimetableError, match="steps must be at most 1,000,000,000,000"):
        AllocatorConfig.for_training(**arguments)
    with pytest.raises(TimetableError, match="events must be at most 1,000,000"):
        AllocatorConfig.for_training(100, events=arguments["steps"])


def test_a_state_with_endless_numbers_is_refused(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    recorded.drive(engine, 3)
    for change in ({"step": 10**400}, {"carry": [10**400, 0]}):
        with pytest.raises(LayoutError, match=r"must be|less than"):
            engine.load_state_dict({**engine.state_dict(), **change})
    assert engine.step_count == 3


@pytest.mark.parametrize("experts", [MOST_EXPERTS + 1, 10**9, 10**400])
def test_a_layer_has_a_bound(experts: int) -> None:
    with pytest.raises(LayoutError, match="at most 1,048,576, got 1"):
        AllocatorEngine(AllocatorConfig()).add_layer("experts", experts)


def test_dimensions_of_policies_that_cut_have_a_bound() -> None:
    config = AllocatorConfig(policy="prune", r_init=32, r_target=16, r_max=100_000)
    engine = AllocatorEngine(config)
    engine.add_layer("a", 1000)
    with pytest.raises(LayoutError, match=r"1400 experts x r_max 100000 .* 1 GiB; use a"):
        engine.add_layer("b", 400)
    assert engine.layer_names == ("a",)
    AllocatorEngine(AllocatorConfig(r_max=100_000)).add_layer("a", MOST_EXPERTS)


HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"layers": {"a": 10**9}}, "layers.a: "),
    ({"layers": {"a": 2**20, "b": 2**20}, "dimensions": 100_000}, "2097152 experts x 100000"),
    ({"dimensions": 10**9}, "dimensions: "),
    ({"steps": 10**400}, "steps: "),
    ({"config": {"r_max": 40_000_000}}, "r_max: must be at most 100,000"),
    ({"config": {"growth_end": 10**15}}, "growth_end: must be at most"),
]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run"
    recorded.record(path)
    return path


@pytest.mark.parametrize(("changes", "message"), HEADERS)
def test_a_recording_has_bounds(
    recording: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "recording.json").write_text(json.dumps(changed(recording, changes)))
    with pytest.raises(LayoutError) as error:
        Recording.open(tmp_path)
    assert message in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_replay_stores_no_dimensions_that_are_not_cut(recording: Path) -> None:
    """An r_max of 100,000 took 800 kB for every expert."""
    found = Recording.open(recording)
    config = recorded.config(r_max=100_000)
    tracemalloc.start()
    replay(found, config)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def changed(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The header of a recording, with other values."""
    header: dict[str, Any] = json.loads((folder / "recording.json").read_text())
    config = header["config"] | changes.get("config", {})
    return header | changes | {"config": config}
