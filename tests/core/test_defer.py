"""Nobody who holds an engine can tell whether its last step was deferred."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocatorEngine, Recording, StatisticError
from drlora_core.recording import RecordingWriter
from tests.core.comparison import assert_same_state, build, give
from tests.strategies import layers, make_samples, options, seeds

OPTIONS: dict[str, Any] = {
    **{"r_init": 1, "r_target": 2, "r_max": 4, "policy": "greedy"},
    **{"warmup_steps": 0, "growth_interval": 1, "growth_end": 4},
}
LAYERS = {"a": 3, "b": 2}

# Every public name but the constructor's: what a caller does with it.
READS: dict[str, Callable[[AllocatorEngine], Any]] = {
    "is_observed": lambda engine: engine.is_observed("a"),
    "step_count": lambda engine: engine.step_count,
    "ranks": lambda engine: engine.ranks("a"),
    "saliency": lambda engine: engine.saliency("a"),
    "routing_frequency": lambda engine: engine.routing_frequency("a"),
    "rank_importance": lambda engine: engine.rank_importance("a"),
    "to_frame": lambda engine: engine.to_frame().to_dict("list"),
    "state_dict": lambda engine: engine.state_dict(),
    "settle": lambda engine: engine.settle(),
    "record_to": lambda engine: engine.record_to(None),
    "deepcopy": lambda engine: copy.deepcopy(engine).state_dict(),
    "pickle": lambda engine: pickle.loads(pickle.dumps(engine)).state_dict(),
}
WRITES: dict[str, Callable[[AllocatorEngine], Any]] = {
    "observe": lambda engine: engine.observe("a", routing=np.ones(3), importance=np.ones(3)),
    "observe_all": lambda engine: engine.observe_all(routing={}, importance={}),
    "skip": lambda engine: engine.skip("a"),
    "step": lambda engine: engine.step(),
    "load_state_dict": lambda engine: engine.load_state_dict(build(OPTIONS, LAYERS).state_dict()),
    "add_layer": lambda engine: engine.add_layer("c", 1),
    "defer": lambda engine: engine.defer(lambda: None),
}
INDEPENDENT = {"from_profile", "layer_names", "num_experts", "budget", "pending"}


def test_every_public_name_is_tested_here() -> None:
    public = {name for name, _ in inspect.getmembers(AllocatorEngine) if not name.startswith("_")}
    assert public == (READS.keys() | WRITES.keys() | INDEPENDENT) - {"deepcopy", "pickle"}


def deferring(close: Callable[[AllocatorEngine], Any] | None = None) -> AllocatorEngine:
    """An engine whose first step is deferred; ``close`` replaces a step of ones."""

    def ones(engine: AllocatorEngine) -> None:
        for name, size in LAYERS.items():
            engine.observe(name, routing=np.ones(size), importance=np.ones(size))
        engine.step()

    engine = build(OPTIONS, LAYERS)
    engine.defer(lambda: (close or ones)(engine))
    return engine


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_every_question_closes_the_step_first_and_once(name: str) -> None:
    calls = []
    engine = deferring(calls.append)
    assert engine.pending
    try:
        (READS | WRITES)[name](engine)
    except ValueError:
        assert name == "step"  # the step that is deferred here observes nothing
    assert calls == [engine]
    assert engine.pending == (name == "defer")


def test_what_cannot_depend_on_the_step_leaves_it_open() -> None:
    engine = deferring()
    assert (engine.layer_names, engine.num_experts("a"), engine.budget("a")) == (("a", "b"), 3, 6)
    assert engine.config.r_max == 4
    assert engine.pending
    assert engine.step_count == 1
    assert not engine.pending


@pytest.mark.parametrize("name", READS)
def test_a_question_gets_the_answer_after_the_step(name: str) -> None:
    closed = deferring()
    closed.settle()
    assert_same_state(READS[name](deferring()), READS[name](closed))


def test_an_error_reaches_the_one_who_asks_and_is_raised_once() -> None:
    engine = deferring(
        lambda engine: engine.observe("a", routing=[np.nan] * 3, importance=np.ones(3))
    )
    with pytest.raises(StatisticError, match="'a', step 1"):
        engine.ranks("b")
    assert not engine.pending
    assert engine.ranks("b").tolist() == [1, 1]


@pytest.mark.parametrize("end", ["record_to", "end of the process"])
def test_a_recording_ends_with_the_deferred_step(tmp_path: Path, end: str) -> None:
    engine = build(OPTIONS, LAYERS)
    writer = RecordingWriter(tmp_path / "run", engine)
    engine.record_to(writer)

    def close() -> None:
        engine.observe_all(routing={"a": np.ones(3)}, importance={"a": np.ones(3)})
        engine.step()

    for _ in range(2):
        engine.defer(close)
    if end == "record_to":
        engine.record_to(None)
    else:
        writer.close()  # what atexit calls
    assert Recording.open(tmp_path / "run").steps == 2


@given(
    options(scopes=("layer", "global")),
    layers(),
    seeds,
    st.lists(st.sampled_from([None, *sorted(READS.keys() - {"record_to", "pickle", "deepcopy"})])),
)
def test_deferred_steps_answer_like_steps(
    options: dict[str, Any], layers: dict[str, int], seed: int, questions: list[str | None]
) -> None:
    layers = {"a" if name == "layers.0" else name: size for name, size in layers.items()}
    plain, deferred = build(options, layers), build(options, layers)
    samples = make_samples(options, layers, seed, "generic", options["growth_end"] + 1)

    def close(engine: AllocatorEngine, sample: Any) -> None:
        for name, pair in sample.items():
            give(engine, name, pair)
        engine.step()

    for number, sample in enumerate(samples):
        close(plain, sample)
        deferred.defer(lambda sample=sample: close(deferred, sample))  # type: ignore[misc]
        for question in questions[number::3]:
            if question is not None:
                assert_same_state(READS[question](deferred), READS[question](plain), question)
    assert_same_state(deferred.state_dict(), plain.state_dict())
