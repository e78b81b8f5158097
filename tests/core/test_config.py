"""Every refusal of AllocatorConfig names the value and the fix, and refuses only what must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError
from drlora_core.bounds import LARGEST_STEP
from drlora_core.errors import DRLoRAError
from tests import reference
from tests.core.comparison import build, feed
from tests.strategies import layers, make_samples, options, seeds

WHOLE: tuple[str, ...] = (
    "r_init",
    "r_target",
    "r_max",
    "warmup_steps",
    "growth_interval",
    "growth_end",
    "seed",
)
WHOLE += ("quota", "max_growth", "layer_ceiling")

# (arguments, fragments that the message must hold: the name, the value or range, the fix)
INVALID: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"r_init": -1}, ("r_init", "must be at least 0, got -1", "input_value=-1")),
    ({"r_target": 0}, ("r_target", "must be at least 1")),
    ({"r_max": -1}, ("r_max", "must be at least 1, got -1", "input_value=-1")),
    ({"warmup_steps": -1}, ("warmup_steps", "must be at least 0")),
    ({"growth_interval": 0}, ("growth_interval", "must be at least 1")),
    ({"growth_end": -5}, ("growth_end", "must be at least 0")),
    ({"quota": 0}, ("quota", "must be at least 1")),
    ({"max_growth": 0}, ("max_growth", "must be at least 1")),
    ({"gamma": -0.5}, ("gamma", "must be at least 0.0, got -0.5")),
    ({"gamma": float("nan")}, ("gamma", "finite")),
    ({"gamma": float("inf")}, ("gamma", "finite")),
    ({"gamma": "1"}, ("gamma", "valid number")),
    ({"gamma": True}, ("gamma", "valid number")),
    ({"routing_decay": 1.0}, ("routing_decay", "must be at least 0.0 and below 1.0, got 1.0")),
    ({"routing_decay": -0.1}, ("routing_decay", "must be at least 0.0 and below 1.0, got -0.1")),
    (
        {"importance_decay": 1.0},
        ("importance_decay", "must be at least 0.0 and below 1.0, got 1.0"),
    ),
    ({"use_routing": 1}, ("use_routing", "valid boolean")),
    ({"use_importance": "yes"}, ("use_importance", "valid boolean")),
    ({"policy": "gready"}, ("policy", "'move', got 'gready'", "did you mean 'greedy'?")),
    ({"scope": "model"}, ("scope", "'layer' or 'global'")),
    ({"layer_floor": 1.5}, ("layer_floor", "must be at least 0.0 and at most 1.0, got 1.5")),
    ({"layer_ceiling": 0, "scope": "global"}, ("layer_ceiling", "must be at least 1")),
    ({"seed": -1}, ("seed", "must be at least 0")),
    ({"rank": 8}, ("no field 'rank'; known: 'r_init'",)),
    ({"r_traget": 4}, ("no field 'r_traget'; did you mean 'r_target'?",)),
    ({"{r_max}": 4}, ("no field '{r_max}'; did you mean 'r_max'",)),
    ({"r_target": 40}, ("r_target 40 > r_max 32", "use r_max >= 40")),
    ({"move_share": 1.5}, ("move_share", "must be at least 0.0 and at most 1.0, got 1.5")),
    ({"r_min": -1}, ("r_min", "must be at least 0")),
    ({"policy": "move", "r_min": 17}, ("r_min 17 > r_target 16", "use r_min <= 16")),
    ({"policy": "prune", "r_init": 20, "r_min": 17}, ("r_min 17 > r_target 16",)),
    ({"policy": "move", "r_init": 20}, ("r_init 20 > r_target 16", "r_init <= 16")),
    ({"policy": "move", "scope": "global"}, ("within a layer", "use scope 'layer'")),
    (
        {"policy": "move", "r_init": 16, "growth_end": 399},
        ("no growth event", "growth_end >= 400, or policy 'uniform'"),
    ),
    ({"policy": "prune", "r_init": 40}, ("r_init 40 > r_max 32", "use r_max >= 40")),
    ({"r_init": 20}, ("r_init 20 > r_target 16", "r_init <= 16", "policy 'prune'")),
    ({"policy": "prune"}, ("r_init 8 < r_target 16", "use r_init >= 16", "e.g. 32")),
    (
        {"growth_end": 399},
        ("no growth event", "200 < t <= 399", "growth_end >= 400", "r_init = r_target"),
    ),
    ({"growth_end": 0, "policy": "prune", "r_init": 32}, ("no growth event", "use growth_end")),
    (
        {"growth_end": 600, "max_growth": 3},
        ("out of reach", "max_growth 3 x 2 events = 6 < 8", "max_growth >= 4 or more events"),
    ),
    (
        {"scope": "global", "layer_ceiling": 15},
        ("layer_ceiling 15", "between r_target 16", "r_max 32"),
    ),
    ({"scope": "global", "layer_ceiling": 33}, ("layer_ceiling 33", "r_max 32")),
    (
        {"scope": "global", "layer_ceiling": 20, "policy": "uniform"},
        ("layer_ceiling has no meaning", "'uniform'", "leave it out"),
    ),
]
INVALID += [
    ({name: value}, (name, "must be a whole number", repr(value)))
    for name in WHOLE
    for value in (True, 8.0, "8", np.float64(8), np.array([8, 8]), np.array(8.5))
]


@pytest.mark.parametrize(("arguments", "fragments"), INVALID, ids=lambda value: str(value)[:50])
def test_invalid_arguments_are_refused_with_name_value_and_fix(
    arguments: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        AllocatorConfig(**arguments)
    assert isinstance(caught.value, ValueError)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "Input should be" not in str(caught.value)
    assert "https://" not in str(caught.value)  # of pydantic's documentation


@pytest.mark.parametrize("name", WHOLE[:-1])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_whole_numbers(name: str, kind: Any) -> None:
    plain = AllocatorConfig(r_init=16)
    value = 32 if name == "r_max" else 16
    config = AllocatorConfig(**{"r_init": 16, name: kind(value)})
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is int
    assert config == plain.model_validate(plain.model_dump() | {name: value})


@given(options(scopes=("layer", "global")))
def test_json_round_trip(options: dict[str, Any]) -> None:
    config = AllocatorConfig(**options)
    assert AllocatorConfig.model_validate_json(config.model_dump_json()) == config
    assert AllocatorConfig(**config.model_dump(mode="json")) == config


def test_defaults_are_those_of_the_paper() -> None:
    config = AllocatorConfig()
    assert config.model_dump() == {
        **{"r_init": 8, "r_target": 16, "r_max": 32},
        **{"warmup_steps": 200, "growth_interval": 200, "growth_end": 2200},
        **{"quota": None, "max_growth": None, "gamma": 1.0},
        **{"routing_decay": 0.9, "importance_decay": 0.9},
        **{"use_routing": True, "use_importance": True},
        **{"policy": "greedy", "scope": "layer", "layer_floor": 0.25, "layer_ceiling": None},
        **{"move_share": 0.2, "r_min": 1},
        "seed": 0,
    }
    assert config.growth_steps == tuple(range(400, 2201, 200))


@pytest.mark.parametrize("field", AllocatorConfig.model_fields)
def test_configuration_is_frozen(field: str) -> None:
    config = AllocatorConfig()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(config, field, 1)
    assert config == AllocatorConfig()


def test_engine_wants_a_configuration() -> None:
    options: Any = {"r_init": 8}
    with pytest.raises(LayoutError, match="must be an AllocatorConfig, got dict"):
        AllocatorEngine(options)


def test_every_error_of_ours_is_a_value_error() -> None:
    assert issubclass(DRLoRAError, ValueError)


@given(options(), st.integers(0, 20))
def test_timetable_is_its_definition(options: dict[str, Any], growth_end: int) -> None:
    options |= {"growth_end": growth_end, "r_init": options["r_target"], "policy": "greedy"}
    config = AllocatorConfig(**options)
    assert list(config.growth_steps) == reference.Engine(options).growth_steps()
    assert config.num_events == len(config.growth_steps)


small = st.integers(1, 4)


@given(
    r_init=small,
    r_target=small,
    r_max=small,
    warmup_steps=st.integers(0, 3),
    growth_interval=st.integers(1, 3),
    growth_end=st.integers(0, 8),
    max_growth=st.none() | st.integers(1, 3),
)
def test_refused_exactly_if_the_budget_is_out_of_reach(**arguments: Any) -> None:
    """What is refused has no allocation that starts at r_init and averages r_target in time."""
    window = reference.Engine(arguments).growth_steps()
    low, high, top = arguments["r_init"], arguments["r_target"], arguments["r_max"]
    most = low  # the largest rank an expert can reach, event by event
    for _ in window:
        most = min(top, most + (arguments["max_growth"] or top))
    feasible = low <= high <= most and high <= top
    try:
        AllocatorConfig(**arguments)
    except pydantic.ValidationError:
        assert not feasible
    else:
        assert feasible


@given(
    options(policies=("greedy", "rescored", "proportional", "random"), quota=None, max_growth=None),
    layers(),
    seeds,
)
def test_even_schedule_meets_the_budget_exactly_at_the_last_event(
    options: dict[str, Any], layers: dict[str, int], seed: int
) -> None:
    engine = build(options, layers)
    events = feed(engine, make_samples(options, layers, seed, "generic", options["growth_end"]))
    last = [event for event in events if event is not None][-1]
    assert last.step == engine.config.growth_steps[-1]
    for name, size in layers.items():
        assert last.ranks[name].sum() == size * options["r_target"] == engine.budget(name)
    assert last.unplaced == 0


def test_a_far_end_costs_nothing() -> None:
    """A user may mean "never" by it."""
    config = AllocatorConfig(growth_interval=10**7, growth_end=LARGEST_STEP)
    assert config.num_events == LARGEST_STEP // 10**7 - 1


# -- a window that follows from the steps --------------------------------------------------------


@given(
    st.integers(1, 100_000),
    st.sampled_from([("early", 0.05, 0.25), ("late", 0.1, 0.6), ("sprout", 0.05, 0.25)]),
    st.integers(1, 20),
)
def test_events_lie_evenly_in_their_share_of_the_training(
    steps: int, timetable: tuple[str, float, float], events: int
) -> None:
    name, start, end = timetable
    config = AllocatorConfig.for_training(steps, timetable=name, events=events)  # type: ignore[arg-type]
    grown = config.growth_steps
    room = max(round(end * steps) - round(start * steps), 1)
    assert len(grown) == min(events, room)
    assert len(set(np.diff(grown))) <= 1
    assert round(start * steps) < grown[0]
    assert grown[-1] <= max(round(end * steps), round(start * steps) + 1) <= steps
    assert (
        room - len(grown) < grown[-1] - round(start * steps) <= room
    )  # no room for a longer interval
    cap = config.max_growth
    assert cap is not None
    assert config.r_init + len(grown) * cap >= config.r_max
    assert cap == 1 or config.r_init + len(grown) * (cap - 1) < config.r_max


@pytest.mark.parametrize("timetable", ["sprout", "early", "late"])
def test_a_timetable_chooses_the_starting_rank_unless_it_is_given(timetable: Any) -> None:
    default = AllocatorConfig.model_fields["r_init"].default
    chosen = AllocatorConfig.for_training(1000, timetable=timetable)
    assert chosen.r_init == (1 if timetable == "sprout" else default) != 2
    small = AllocatorConfig.for_training(1000, timetable=timetable, r_target=4)
    assert small.r_init == (1 if timetable == "sprout" else 2)
    assert AllocatorConfig.for_training(1000, timetable=timetable, r_init=2).r_init == 2
    same = AllocatorConfig.for_training(1000, timetable="early", r_init=1)
    assert (chosen == same) is (timetable == "sprout")
    pruned = AllocatorConfig.for_training(1000, timetable=timetable, policy="prune", r_target=5)
    assert pruned.r_init == 10  # it starts above the budget


def test_what_is_given_of_a_window_stays() -> None:
    given_fields = {"warmup_steps": 30, "growth_end": 90, "gamma": 0.5, "max_growth": 4}
    config = AllocatorConfig.for_training(1000, events=4, **given_fields)
    assert config.growth_steps == (45, 60, 75, 90)
    assert config.model_dump(include=given_fields.keys()) == given_fields
    slow = AllocatorConfig.for_training(1000, growth_interval=100)
    assert slow.growth_steps == (150, 250)
    assert slow.max_growth == 16  # 1 to 32 in two events
    assert AllocatorConfig.for_training(1000, max_growth=None).max_growth is None


@pytest.mark.parametrize("fields", [{"policy": "uniform"}, {"policy": "prune", "r_init": 32}])
def test_policies_without_growth_have_no_cap(fields: dict[str, Any]) -> None:
    assert AllocatorConfig.for_training(1000, **fields).max_growth is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 10.0}, "must be a whole number, got 10.0"),
        ({"events": 0}, "events must be at least 1, got 0"),
        ({"timetable": "erly"}, "no timetable 'erly'; did you mean 'early'"),
        ({"warmup_steps": 500}, "no growth event: none of the steps 500 < t <= 250"),
        ({"warmup_steps": "5"}, "must be a whole number, got '5'"),
        ({"gama": 1.0}, "no argument 'gama'; did you mean 'gamma'"),
        ({"timetabel": "late"}, "no argument 'timetabel'; did you mean 'timetable'"),
        ({"r_target": 0}, "r_target\n  must be at least 1, got 0"),
    ],
)
def test_a_window_that_cannot_be_laid_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocatorConfig.for_training(**{"steps": 1000, **arguments})
