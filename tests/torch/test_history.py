"""Growth events are saved with an adapter and come back with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drlora_torch
from tests.torch import helpers, models
from tests.torch.test_checkpoint import LAYER, _at, _drop, _put, _set, refused, rewrite, trained


@pytest.mark.parametrize("policy", ["greedy", "prune", "move"])
def test_events_come_back(tmp_path: Path, policy: str) -> None:
    adapter = trained(7, config={"policy": policy, "r_init": 6 if policy == "prune" else 2})
    assert len(adapter.events) == 2
    adapter.save_pretrained(tmp_path)
    loaded = drlora_torch.load(models.build(), tmp_path)
    restored = helpers.attach(
        models.build(), config={"policy": policy, "r_init": 6 if policy == "prune" else 2}
    )
    restored.restore(tmp_path)
    for again in (loaded, restored):
        assert len(again.events) == 2
        for mine, theirs in zip(adapter.events, again.events, strict=True):
            assert (mine.step, mine.index, mine.unplaced) == (
                theirs.step,
                theirs.index,
                theirs.unplaced,
            )
            for field in ("deltas", "ranks", "saliency", "cut"):
                arrays, others = getattr(mine, field), getattr(theirs, field)
                assert list(arrays) == list(others)
                for name, array in arrays.items():
                    assert array.dtype == others[name].dtype
                    assert np.array_equal(array, others[name])


SAVED = f"{LAYER}/events"
DAMAGED: list[tuple[str, Callable[..., None], str]] = [
    ("description", _set("events", to=[]), "has an unknown tensor '.*/events/"),
    ("description", _drop("events"), "has an unknown tensor '.*/events/"),
    (
        "description",
        _set("events", to=[{"step": 4}]),
        "/events/.* has shape|not a complete adapter",
    ),
    ("description", _set("events", to=[{"step": 4}, {"step": 6}]), "not a complete adapter"),
    ("tensors", _drop(f"{SAVED}/deltas"), "lacks tensor"),
    ("tensors", _put(f"{SAVED}/deltas", lambda t: t[:, 1:]), "has shape"),
    ("tensors", _put(f"{SAVED}/deltas", lambda t: t.double()), "wrong dtype"),
    ("tensors", _put(f"{SAVED}/deltas", _at(-1, 1)), "lead to other ranks"),
    ("tensors", _put(f"{SAVED}/saliency", _at(0, float("nan"))), "not finite"),
]


@pytest.mark.parametrize(
    ("part", "change", "match"), DAMAGED, ids=[str(i) for i in range(len(DAMAGED))]
)
def test_damaged_events_are_refused(
    tmp_path: Path, part: str, change: Callable[..., None], match: str
) -> None:
    trained(7, router="trainable").save_pretrained(tmp_path)
    changes: dict[str, Any] = {part: change}
    rewrite(tmp_path, **changes)
    refused(tmp_path, match)
