"""What counts as a sample, and what must not: a forward counts when backward reaches it, once."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.step import backward
from tests.torch import helpers, models
from tests.torch.helpers import RouterLog, Spy
from tests.torch.test_statistics import ROUNDING, padded, setup


@pytest.mark.parametrize("auto_step", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant: bool, auto_step: bool) -> None:
    samples = []
    for checkpointing in (False, True):
        model, adapter, optimizer, spy = setup(auto_step=auto_step)
        if checkpointing:
            helpers.checkpoint_activations(model, reentrant=reentrant)
        calls = RouterLog(adapter).calls
        for seed in range(2):
            model(**helpers.batch(seed), use_cache=False).loss.backward()
        optimizer.step()
        if not auto_step:
            adapter.step()
        samples.append(spy.samples[0])
        recomputed = {len(each) for each in calls.values()}
        assert recomputed == ({4} if checkpointing else {2})
    plain, checkpointed = samples
    for name, (phi, s, tokens) in plain.items():
        assert np.array_equal(phi, checkpointed[name][0])
        assert np.array_equal(s, checkpointed[name][1])
        assert tokens == checkpointed[name][2] == 42


def test_what_must_not_count() -> None:
    """Evaluation, no_grad, generation, pauses and the base model between two training forwards."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    ids = models.tokens(2, 5)
    model(**helpers.batch()).loss.backward()
    first = {name: list(calls) for name, calls in log.calls.items()}
    model.eval()
    model(ids)
    with torch.no_grad():
        model(ids)
        model.train()(ids)
        model.generate(ids, max_new_tokens=3, do_sample=False)
    model.eval().generate(ids, max_new_tokens=3, do_sample=False)
    model.train()
    with torch.inference_mode():
        model(ids)
    with adapter.paused():
        model(ids)
    with adapter.disabled():
        model(ids)
    assert all(len(calls) > 8 for calls in log.calls.values())
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        log.calls[name] = first[name]
        assert tokens == 21
        np.testing.assert_allclose(phi, log.phi(name, [None]), rtol=1e-12)


def test_paused_steps_do_not_count() -> None:
    model, adapter, optimizer, spy = setup()
    with adapter.paused():
        helpers.step(model, optimizer)
    assert adapter.engine.step_count == 0
    helpers.step(model, optimizer, 1)
    assert adapter.engine.step_count == 1
    assert [tokens for _, _, tokens in spy.samples[0].values()] == [21, 21]


@pytest.mark.parametrize("where", ["", "model", "model.layers.1"])
def test_a_failed_forward_leaves_the_watch_in_order(where: str) -> None:
    """Whatever fails, hooks of the user before ours included."""

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model = models.build()
    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    adapter = helpers.attach(model)
    optimizer, spy = helpers.adamw(adapter), Spy(adapter)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.eval()(models.tokens())
    handle.remove()
    model.train()
    helpers.step(model, optimizer)
    assert [tokens for _, _, tokens in spy.samples[0].values()] == [21, 21]
    assert active_tracker(state_of(adapter))._watch.running is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dropped_gradients_drop_their_tokens(set_to_none: bool) -> None:
    """A backward whose gradients are thrown away leaves no trace in the next step's phi."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    model(**helpers.batch(0)).loss.backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    model(**helpers.batch(1)).loss.backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 21
        np.testing.assert_allclose(phi, log.phi(name, [None]), rtol=1e-12)


def test_batches_that_never_reach_backward_count_nothing() -> None:
    """Given up after the forward, or by an exception on the way back."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    model(**helpers.batch(0))

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    output = model(**helpers.batch(1))
    output.logits.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        output.loss.backward()
    model(**helpers.batch(2)).loss.backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 21
        np.testing.assert_allclose(phi, log.phi(name, [None]), rtol=1e-12)


def test_gradients_of_zero_are_not_dropped_ones() -> None:
    """A micro-batch whose loss is constant (no advantage, all labels masked) has been seen."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    (model(**helpers.batch(0)).loss * 0.0).backward()
    assert not any(bool(p.grad.any()) for p in adapter.parameters())
    model(**helpers.batch(1)).loss.backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 42
        np.testing.assert_allclose(phi, log.phi(name, [None, None]), rtol=1e-12)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_second_backward_of_one_forward_counts_nothing(reentrant: bool | None) -> None:
    samples = []
    for backwards in (1, 2):
        model, _, optimizer, spy = setup()
        if reentrant is not None:
            helpers.checkpoint_activations(model, reentrant=reentrant)
        loss = model(**helpers.batch(), use_cache=False).loss
        for _ in range(backwards):
            loss.backward(retain_graph=True)
        optimizer.step()
        samples.append(spy.samples[0])
    once, twice = samples
    for name, (phi, _, tokens) in twice.items():
        assert tokens == 21
        np.testing.assert_array_equal(phi, once[name][0])


def test_two_forwards_of_one_backward_both_count() -> None:
    """Chosen and rejected answers, in calls of their own and with masks of their own."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    batches = [padded("right"), helpers.batch(1, 2, 5), padded("left")]
    sum(model(**batch).loss for batch in batches).backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 14 + 10 + 14
        masks = [batch.get("attention_mask") for batch in batches]
        np.testing.assert_allclose(phi, log.phi(name, masks), rtol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_padding_does_not_count_in_checkpointed_layers(reentrant: bool) -> None:
    """Also where several forwards wait for one backward pass: each has its own mask."""
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    batches = [padded("right"), helpers.batch(1, 3, 7), padded("left")]
    sum(model(**batch).loss for batch in batches).backward()
    optimizer.step()
    model, adapter, optimizer, checkpointed = setup()
    helpers.checkpoint_activations(model, reentrant=reentrant)
    sum(model(**batch, use_cache=False).loss for batch in batches).backward()
    optimizer.step()
    for name, (phi, _, tokens) in checkpointed.samples[0].items():
        assert tokens == spy.samples[0][name][2] == 14 + 21 + 14
        masks = [batch.get("attention_mask") for batch in batches]
        np.testing.assert_allclose(phi, log.phi(name, masks), rtol=1e-12)


class Interrupt:
    """Ctrl-C in a layer, once."""

    def __init__(self, module: Any) -> None:
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.handle.remove()
        raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["generation", "evaluation", "training"])
def test_an_interrupted_forward_leaves_nothing_behind(what: str) -> None:
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    Interrupt(model.get_submodule("model.layers.1"))
    if what == "evaluation":
        model.eval()
    ids = models.tokens(2, 5)
    run = {"generation": lambda: model.generate(ids, max_new_tokens=3, do_sample=False)}
    with pytest.raises(KeyboardInterrupt):
        run.get(what, lambda: model(**padded("left")))()
    model.train()
    helpers.step(model, optimizer)
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 21
        np.testing.assert_allclose(phi, log.phi(name, [None]), rtol=1e-12)


def test_threads_that_generate_disturb_nothing() -> None:
    def train(threads: int) -> tuple[list[Any], dict[str, list[int]]]:
        model = models.build().eval()
        adapter = helpers.attach(model)
        optimizer, spy = helpers.adamw(adapter), Spy(adapter)
        stop = threading.Event()

        def generate() -> None:
            while not stop.is_set():
                model.generate(models.tokens(2, 4), max_new_tokens=2, do_sample=False)

        workers = [threading.Thread(target=generate) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for seed in range(7):
            model(**helpers.batch(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stop.set()
        for worker in workers:
            worker.join()
        assert adapter.skipped_steps == 0
        return spy.samples, helpers.rank_history(adapter)

    alone, ranks = train(0)
    disturbed, its_ranks = train(3)
    assert its_ranks == ranks
    for mine, theirs in zip(alone, disturbed, strict=True):
        assert all(np.array_equal(mine[name][0], theirs[name][0]) for name in mine)


def test_a_mask_that_fits_no_tokens_is_said_once() -> None:
    """A layer that receives other tokens than the model was given: their padding is unknown."""
    model, _, optimizer, spy = setup()
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda _, args: (args[0][:, :-1].contiguous(),))
    block.register_forward_hook(lambda _, args, out: nn.functional.pad(out, (0, 0, 0, 1)))
    with pytest.warns(RuntimeWarning, match=r"layers\.0\.mlp.*18 tokens.*mask of shape \[3, 7\]"):
        model(**padded("left")).loss.backward()
    model(**padded("left")).loss.backward()  # warnings are errors
    optimizer.step()
    tokens = {name: sample[2] for name, sample in spy.samples[0].items()}
    assert list(tokens.values()) == [36, 28]


def test_training_in_evaluation_mode_counts(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and the samples are those of training mode (these models drop nothing)."""
    runs = []
    for training in (True, False):
        model, adapter, optimizer, spy = setup()
        model.train(training)
        for seed in range(2):
            helpers.step(model, optimizer, seed)
        assert adapter.skipped_steps == 0
        runs.append(spy.samples)
    for plain, evaluation in zip(*runs, strict=True):
        for name, (phi, s, tokens) in plain.items():
            assert np.array_equal(phi, evaluation[name][0])
            assert np.array_equal(s, evaluation[name][1])
            assert tokens == evaluation[name][2] == 21
    assert ["evaluation mode" in record.message for record in caplog.records] == [True]


def test_a_step_without_backward_through_the_experts_is_noticed() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.warns(RuntimeWarning, match="no token was counted"):
        optimizer.step()
    assert adapter.skipped_steps == 1
    assert adapter.engine.step_count == 1
    for name in adapter.layers:
        assert not adapter.engine.routing_frequency(name).any()
        assert adapter.engine.state_dict()["layers"][name]["routing_count"] == 0


def test_a_step_by_hand_inside_paused_does_not_count() -> None:
    model, adapter, optimizer, spy = setup(auto_step=False)
    with adapter.paused():
        helpers.step(model, optimizer)
        assert adapter.step() is None
    assert adapter.engine.step_count == 0
    helpers.step(model, optimizer, 1)
    adapter.step()
    assert adapter.engine.step_count == 1
    assert [tokens for _, _, tokens in spy.samples[0].values()] == [21, 21]


def test_importance_is_read_after_a_backward_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes it is read at the end of a pass, which never came in the first."""
    monkeypatch.setattr(backward, "several_processes", lambda group: True)
    model, adapter, optimizer, spy = setup(auto_step=False)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[0].register_forward_hook(
        lambda _, args, output: output.register_hook(fail) and None
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**helpers.batch(0)).loss.backward()
    handle.remove()
    optimizer.zero_grad()
    model(**helpers.batch(1)).loss.backward()
    expected = helpers.importance(adapter)
    optimizer.step()
    adapter.step()
    for name, (_, s, tokens) in spy.samples[0].items():
        assert tokens == 21
        assert s.max() > 0
        np.testing.assert_allclose(s, expected[name], **ROUNDING)


def test_a_batch_is_dropped_though_both_forwards_ran_before() -> None:
    model, adapter, optimizer, spy = setup()
    log = RouterLog(adapter)
    first, second = (model(**helpers.batch(seed)).loss for seed in range(2))
    first.backward()
    optimizer.zero_grad()
    second.backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 21
        np.testing.assert_allclose(phi, log.phi(name, [None]), rtol=1e-12)


def test_gradients_taken_by_autograd_grad_accumulate() -> None:
    """They never arrive at the parameters, so their absence says nothing."""
    model, adapter, optimizer, spy = setup()
    parameters = adapter.parameters()
    grads = [torch.autograd.grad(model(**helpers.batch(i)).loss, parameters) for i in range(2)]
    for parameter, *both in zip(parameters, *grads, strict=True):
        parameter.grad = sum(both)
    optimizer.step()
    assert {tokens for _, _, tokens in spy.samples[0].values()} == {42}


def test_a_loss_that_is_kept_keeps_no_model() -> None:
    model, adapter, optimizer, spy = setup()
    loss = model(**padded("left")).loss
    loss.backward()
    gone = weakref.ref(model)
    del model, adapter, optimizer, spy
    gc.collect()
    assert loss.isfinite()
    assert gone() is None


def test_an_optimizer_step_inside_disabled_does_not_move_the_routers_of_the_base() -> None:
    model = models.build()
    adapter = helpers.attach(model, router="trainable")
    optimizer = helpers.adamw(adapter)
    model(**helpers.batch()).loss.backward()
    with (
        adapter.disabled(),
        pytest.raises(drlora_torch.AttachError, match=r"inside adapter\.disabled"),
    ):
        optimizer.step()
    optimizer.step()
    assert adapter.engine.step_count == 1
