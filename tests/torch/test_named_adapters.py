"""Several named adapters on one model: each lives as it would alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import drlora_torch
from drlora_torch.storage.adapter_file import FILE_NAME
from tests.marks import slow_but
from tests.torch import helpers, named
from tests.torch.named import FAMILIES, OF_EACH_KIND, life, outputs, same, several


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_active_one_alone(family: str) -> None:
    model, adapters = several(family)
    wanted = {n: outputs(named.alone(n, family, seed)) for seed, n in enumerate(adapters)}
    assert not torch.equal(wanted["a"], wanted["b"])
    for name in "abcacb":
        adapters[name].activate()
        assert torch.equal(outputs(model), wanted[name])
        assert [n for n, adapter in adapters.items() if adapter.is_active] == [name]
    with torch.no_grad(), adapters["b"].disabled():
        assert torch.equal(outputs(model), outputs(named.build(family)))


@pytest.mark.parametrize(
    "mode", slow_but(["after_warmup", "trainable", "auto_step=False"], ["after_warmup"])
)
@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_each_trains_as_it_would_alone(family: str, mode: str) -> None:
    """Switched after every step; losses, ranks, routers and optimizers are those of single ones."""
    by_hand = mode == "auto_step=False"
    options = {"auto_step": False} if by_hand else {"router": mode}
    lives: list[list[Any]] = []
    for together in (True, False):
        shared = named.build(family)
        runs = []
        for name in "abc":
            model = shared if together else named.build(family)
            adapter = named.attach(model, name, **options)
            runs.append((model, adapter, helpers.adamw(adapter, weight_decay=0.1)))
        losses = []
        for seed in range(7):
            for model, adapter, optimizer in runs:
                adapter.activate()
                losses.append(named.step(model, optimizer, seed))
                if by_hand:
                    adapter.step()
        assert all(adapter.events for _, adapter, _ in runs)
        lives.append([losses, *(life(adapter, optimizer) for _, adapter, optimizer in runs)])
    assert same(*lives)


def test_only_the_active_one_requires_gradients() -> None:
    model, adapters = several(router="trainable")
    for name in "cab":
        adapters[name].activate()
        helpers.batch()
        model(**helpers.batch()).loss.backward()
        for adapter in adapters.values():
            active = adapter.is_active
            assert {p.requires_grad for p in adapter.lora_parameters()} == {active}
            assert all((p.grad is not None) == active for p in adapter.lora_parameters())
        learning = {id(p) for p in model.parameters() if p.requires_grad}
        assert learning == {id(p) for p in adapters[name].parameters()}
        resting = [a for a in adapters.values() if not a.is_active]
        assert all(
            len(a.parameters()) and not a.lora_parameters()[0].requires_grad for a in resting
        )


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "adafactor"])
def test_an_optimizer_of_all_moves_the_active_one_alone(kind: str) -> None:
    model, adapters = several(names="ab")
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5),
        "fused": lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5, fused=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
        "adafactor": lambda: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.5),
    }[kind]()
    for seed, name in enumerate("abba"):
        adapters[name].activate()
        resting = adapters["b" if name == "a" else "a"]
        before = life(resting), {n: copy.deepcopy(optimizer.state.get(n)) for n in parameters}
        helpers.step(model, optimizer, seed)
        assert same(life(resting), before[0])
        for parameter in resting.lora_parameters():
            assert same(optimizer.state.get(parameter), before[1][parameter])
    assert [adapter.engine.step_count for adapter in adapters.values()] == [2, 2]


def test_optimizers_of_resting_adapters_leave_the_routers_alone() -> None:
    """Both step in every iteration; routers are parameters of the model, which both hold."""
    lives = []
    for both_step in (True, False):
        model, adapters = several(names="ab", router="trainable")
        optimizers = {name: helpers.adamw(adapter) for name, adapter in adapters.items()}
        for seed, name in enumerate("abbaab"):
            adapters[name].activate()
            model(**helpers.batch(seed)).loss.backward()
            gradients = [p.grad for p in adapters[name].router_parameters().values()]
            for other in "ab" if both_step else name:
                optimizers[other].step()
            now = [p.grad for p in adapters[name].router_parameters().values()]
            assert all(x is y for x, y in zip(gradients, now, strict=True))
            optimizers[name].zero_grad()
        lives.append([life(adapter, optimizers[name]) for name, adapter in adapters.items()])
    assert same(*lives)
    assert not same(lives[0][0]["routers"], lives[0][1]["routers"])


def test_one_optimizer_for_routers_of_two_is_refused() -> None:
    model, adapters = several(names="ab", router="trainable")
    both = {id(p): p for adapter in adapters.values() for p in adapter.parameters()}
    optimizer = torch.optim.AdamW(both.values(), lr=1e-2)
    before = [life(adapter) for adapter in adapters.values()]
    with pytest.raises(drlora_torch.AttachError, match="an optimizer of its own"):
        helpers.step(model, optimizer)
    assert same([life(adapter) for adapter in adapters.values()], before)


@pytest.mark.parametrize("auto_step", [True, False])
def test_micro_batches_of_several_may_take_turns(auto_step: bool, tmp_path: Path) -> None:
    """What a step has gathered rests with its adapter, and is in its file."""
    lives: list[list[Any]] = []
    for together in (True, False):
        shared = named.build()
        runs = []
        for name in "abc":
            model = shared if together else named.build()
            options = {"router": "trainable", "auto_step": auto_step}
            adapter = named.attach(model, name, **options)
            runs.append((model, adapter, helpers.adamw(adapter)))
        for seed in range(12):
            for model, adapter, optimizer in runs:
                adapter.activate()
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model(**helpers.batch(seed)).loss.backward()
                if seed % 3 == 2:
                    optimizer.step()
                    if not auto_step:
                        adapter.step()
                    optimizer.zero_grad()
            if seed % 3 == 1:
                (_, first, optimizer), *_ = runs
                first.save_pretrained(tmp_path / f"{seed} {together}")
                if together:
                    optimizer.step()  # of a resting adapter
        lives.append([life(adapter, optimizer) for _, adapter, optimizer in runs])
    assert same(*lives)
    for seed in (1, 4):
        files = [load_file(tmp_path / f"{seed} {t}" / FILE_NAME) for t in (True, False)]
        assert same(*files)
        assert any(key.startswith("pending/gradient/router/") for key in files[0])


def test_a_finished_step_leaves_no_gradients_behind() -> None:
    """They are still there after ``optimizer.step``, but they have been used."""
    model, adapters = several(names="ab")
    optimizer = helpers.adamw(adapters["b"])
    model(**helpers.batch()).loss.backward()
    optimizer.step()
    adapters["a"].activate()
    adapters["b"].activate()
    assert all(parameter.grad is None for parameter in adapters["b"].parameters())
