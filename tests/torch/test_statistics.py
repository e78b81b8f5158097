"""Statistics against a plain recomputation, and everything that must not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drlora_torch.step.forwards import flatten_mask
from tests.torch import helpers, models
from tests.torch.helpers import RouterLog, Spy

# float32 weights and gradients, read in float64: the rounding of one float32 sum
ROUNDING = {"rtol": 3e-6, "atol": 1e-12}


def setup(family: str = "olmoe", **options: Any) -> tuple[Any, Any, Any, Spy]:
    model = models.build(family)
    adapter = helpers.attach(model, **options)
    helpers.uneven(adapter)
    return model, adapter, helpers.adamw(adapter), Spy(adapter)


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_routing_and_importance(family: str, layout: str) -> None:
    model, adapter, optimizer, spy = setup(family, layout=layout, config={"growth_end": 200})
    log = RouterLog(adapter)
    for seed in range(2):
        model(**helpers.batch(seed)).loss.backward()
        expected = helpers.importance(adapter)
        optimizer.step()
        optimizer.zero_grad()
        for name in adapter.layers:
            phi, s, tokens = spy.samples[seed][name]
            np.testing.assert_allclose(phi, log.phi(name, [None]), rtol=1e-12)
            np.testing.assert_allclose(s, expected[name], **ROUNDING)
            assert tokens == 3 * 7
            assert phi.max() > 0
            assert s.max() > 0
    assert adapter.engine.step_count == 2


def test_an_expert_that_no_token_visits_has_zero_routing() -> None:
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    model(input_ids=models.tokens(1, 2), labels=models.tokens(1, 2)).loss.backward()
    optimizer.step()
    for name, (phi, s, tokens) in spy.samples[0].items():
        visited = {int(e) for index, _ in log.calls[name] for e in index.reshape(-1)}
        idle = [e for e in range(models.EXPERTS) if e not in visited]
        assert len(idle) >= 4
        assert phi[idle].tolist() == [0.0] * len(idle)
        assert not s[idle].any()
        assert phi[sorted(visited)].min() > 0
        assert tokens == 2


def padded(side: str) -> dict[str, Tensor]:
    ids = models.tokens(3, 7)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 2, 5)):
        if pad:
            mask[row, slice(0, pad) if side == "left" else slice(7 - pad, 7)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_padding_does_not_count(family: str, side: str) -> None:
    model, adapter, optimizer, spy = setup(family)
    log = RouterLog(adapter)
    batch = padded(side)
    model(**batch).loss.backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 21 - 7
        np.testing.assert_allclose(phi, log.phi(name, [batch["attention_mask"]]), rtol=1e-12)


def test_mask_given_by_position_counts_too() -> None:
    model, _, optimizer, spy = setup()
    batch = padded("left")
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    logits.square().mean().backward()
    optimizer.step()
    assert {tokens for _, _, tokens in spy.samples[0].values()} == {14}


def test_accumulation_weighs_by_tokens() -> None:
    """One sample per optimizer step; micro-batches of other sizes weigh by their tokens."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    masks: list[Tensor | None] = []
    for seed, (rows, length) in enumerate([(3, 7), (1, 4), (2, 9)]):
        batch = helpers.batch(seed, rows, length)
        (model(**batch).loss / 3).backward()
        masks.append(None)
    batch = padded("right")
    model(**batch).loss.backward()
    masks.append(batch["attention_mask"])
    expected = helpers.importance(adapter)
    optimizer.step()
    assert len(spy.samples) == 1
    for name, (phi, s, tokens) in spy.samples[0].items():
        assert tokens == 21 + 4 + 18 + 14
        np.testing.assert_allclose(phi, log.phi(name, masks), rtol=1e-12)
        np.testing.assert_allclose(s, expected[name], **ROUNDING)


def test_steps_by_hand_decide_as_automatic_ones() -> None:
    """Also with zero_grad before step, and with a scaled loss."""
    runs = []
    for how in ("auto", "hand", "zero first", "scaled"):
        model = models.build()
        adapter = helpers.attach(model, auto_step=how == "auto")
        optimizer = helpers.adamw(adapter)
        spy = Spy(adapter)
        scale = 1024.0 if how == "scaled" else 1.0
        for seed in range(7):
            (model(**helpers.batch(seed)).loss * scale).backward()
            for parameter in adapter.parameters():
                parameter.grad /= scale
            optimizer.step()
            if how == "zero first":
                optimizer.zero_grad()
            if how != "auto":
                adapter.step(grad_scale=scale)
            optimizer.zero_grad()
        assert adapter.engine.step_count == 7
        runs.append((spy.samples, helpers.rank_history(adapter)))
    samples, ranks = runs[0]
    for other_samples, other_ranks in runs[1:]:
        assert other_ranks == ranks
        for mine, theirs in zip(samples, other_samples, strict=True):
            for name, (phi, s, tokens) in mine.items():
                assert np.array_equal(phi, theirs[name][0])
                np.testing.assert_allclose(theirs[name][1], s, rtol=1e-14)
                assert tokens == theirs[name][2]


def test_averages_of_the_engine_are_those_of_the_samples() -> None:
    """End to end: f and g equal the contract's formulas on the recomputed samples."""
    model = models.build()
    adapter = helpers.attach(model, config={"growth_end": 200, "warmup_steps": 100})
    optimizer = helpers.adamw(adapter)
    log = RouterLog(adapter)
    expected: list[dict[str, Any]] = []
    for seed in range(3):
        model(**helpers.batch(seed)).loss.backward()
        expected.append(helpers.importance(adapter))
        optimizer.step()
        optimizer.zero_grad()
    decay = 0.9 ** np.array([2, 1, 0])[:, None]
    for name in adapter.layers:
        phi = np.stack([log.phi(name, [None] * (3 - t))[:] for t in range(3)])
        phi = np.stack([3 * phi[0] - 2 * phi[1], 2 * phi[1] - phi[2], phi[2]])  # undo the means
        s = np.stack([step[name][:, :2].mean(axis=1) for step in expected])
        f = (0.1 * decay * phi).sum(0) / (1 - 0.9**3)
        g = (0.1 * decay * s).sum(0) / (1 - 0.9**3)
        np.testing.assert_allclose(adapter.engine.routing_frequency(name), f, rtol=1e-10)
        np.testing.assert_allclose(adapter.engine.rank_importance(name), g, **ROUNDING)
        saliency = f * g / 3.0
        np.testing.assert_allclose(adapter.engine.saliency(name), saliency, rtol=1e-5)


def test_tokens_of_a_mask() -> None:
    """The last columns belong to the tokens; a mask of other tokens is none."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert flatten_mask(mask, 6).tolist() == [False, True, True, True, True, False]
    assert flatten_mask(mask, 2).tolist() == [True, False]  # with a cache of two columns
    assert flatten_mask(mask, 0).tolist() == []
    assert flatten_mask(mask, 5) is None
    assert flatten_mask(mask, 8) is None
    assert flatten_mask(mask[:0], 6) is None
