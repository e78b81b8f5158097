"""One thread trains a model; others may evaluate meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import drlora_torch
from tests.torch import helpers, models


def run_beside(work: Callable[[], object]) -> BaseException | None:
    """What another thread raises."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] if found else None


def test_a_second_thread_that_trains_is_refused_and_disturbs_nothing() -> None:
    results = []
    for beside in (False, True):
        model = models.build().train()
        adapter = helpers.attach(model)
        optimizer = helpers.adamw(adapter)
        found: list[BaseException | None] = []

        def interfere(*_: Any, model: Any = model, found: list[Any] = found) -> None:
            if threading.current_thread() is threading.main_thread():
                found.append(run_beside(lambda: model(**helpers.batch(7)).loss))
                with torch.no_grad():
                    found.append(run_beside(lambda: evaluate(model)))

        if beside:
            model.model.layers[1].register_forward_pre_hook(interfere)
        losses = [helpers.step(model, optimizer, seed) for seed in range(4)]
        assert (adapter.engine.step_count, adapter.skipped_steps) == (4, 0)
        results.append((losses, helpers.rank_history(adapter)))
    assert results[0] == results[1]
    assert len(found) == 8
    assert found[1::2] == [None] * 4
    for error in found[::2]:
        with pytest.raises(drlora_torch.AttachError, match="two threads train one model"):
            raise error or AssertionError


def evaluate(model: Any) -> None:
    with torch.no_grad():
        model(**helpers.batch(8))


def test_training_may_move_to_another_thread() -> None:
    model = models.build().train()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    model(**helpers.batch())  # a forward that nobody goes on with
    assert run_beside(lambda: helpers.step(model, optimizer, 1)) is None
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    assert run_beside(lambda: helpers.step(model, optimizer, 2)) is None
    assert adapter.engine.step_count == 2
