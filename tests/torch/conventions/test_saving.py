"""Merging, taking it back, and the checkpoints that Transformers writes, for every convention."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.marks import slow_but
from tests.torch import helpers
from tests.torch.conventions.families import CASES, batch, build

SAVED = [family for family in sorted(CASES) if family != "step3p7"]  # whose head is ours


def attached(family: str) -> tuple[Any, Any]:
    model = build(family, torch.float32).eval()
    adapter = helpers.attach(model, layers=CASES[family].patterns)
    helpers.uneven(adapter)
    return model, adapter


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model(**batch(family)).logits
    return found


def reloaded(model: Any, path: Path) -> Any:
    """What ``from_pretrained`` makes of a directory, loading every weight."""
    again, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return again.eval()


@pytest.mark.parametrize("family", sorted(CASES))
def test_unmerge_is_exact(family: str) -> None:
    model, adapter = attached(family)
    adapted = logits(model, family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapter.merge()
    torch.testing.assert_close(logits(model, family), adapted, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(logits(model, family), adapted)
    assert all(helpers.equal(value, weights[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("family", SAVED)
def test_a_merged_checkpoint_is_a_plain_one(family: str, tmp_path: Path) -> None:
    model, adapter = attached(family)
    adapted = logits(model, family)
    adapter.merge_and_save(tmp_path)
    assert torch.equal(logits(model, family), adapted)
    saved = logits(reloaded(model, tmp_path), family)
    torch.testing.assert_close(saved, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SAVED)
def test_save_pretrained_of_an_adapted_model_writes_the_base(family: str, tmp_path: Path) -> None:
    base = build(family, torch.float32).eval()
    model = copy.deepcopy(base)
    adapter = helpers.attach(model, layers=CASES[family].patterns)
    helpers.uneven(adapter)
    model.save_pretrained(tmp_path)
    saved, wanted = reloaded(model, tmp_path).state_dict(), base.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(helpers.equal(saved[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("family", slow_but(sorted(CASES), sorted(CASES)[::4]))
def test_a_dropped_model_is_collected(family: str) -> None:
    """No hook or forward of ours keeps it alive."""
    model, adapter = attached(family)
    optimizer = helpers.adamw(adapter)
    model.train()
    model(**batch(family)).loss.backward()
    optimizer.step()
    gone = weakref.ref(model)
    del model, adapter, optimizer
    gc.collect()
    assert gone() is None
