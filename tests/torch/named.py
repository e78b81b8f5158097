"""Adapters by name, the models they are tried on, and all that an adapter is, to compare."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.lifecycle.trained import trained_values
from tests.torch import helpers, models
from tests.torch.conventions import families

FAMILIES = ["olmoe", "gpt_oss", *families.FAMILIES]
OF_EACH_KIND = ["olmoe", "dbrx", "switch_transformers"]
"""The interface, stacked weights, per-expert Linears."""
KINDS: dict[str, dict[str, Any]] = {
    "a": {"alpha": 7.0},
    "b": {"config": {"r_init": 1, "r_target": 3, "seed": 5}, "layout": "masked"},
    "c": {"config": {"growth_interval": 1, "r_max": 6}, "layers": ["*1*"], "dropout": 0.2},
}
"""Options of adapters that differ in engine, ranks, layout, scaling and layers, by name."""


def build(family: str = "olmoe") -> Any:
    if family in models.FAMILIES:
        return models.build(family)
    return families.build(family, torch.float32)


def attach(model: Any, name: str, **options: Any) -> drlora_torch.Adapter:
    return helpers.attach(model, adapter_name=name, **{**KINDS[name], **options})


def several(
    family: str = "olmoe", names: str = "abc", **options: Any
) -> tuple[Any, dict[str, drlora_torch.Adapter]]:
    """Build a model with adapters whose B is not zero; the last is active."""
    model = build(family)
    found = {name: attach(model, name, **options) for name in names}
    for seed, adapter in enumerate(found.values()):
        helpers.fill(adapter, seed)
    return model, found


def alone(name: str, family: str = "olmoe", seed: int = 0, **options: Any) -> Any:
    """Build a model with one such adapter, as the ``seed``-th of :func:`several`."""
    model = build(family)
    helpers.fill(attach(model, name, **options), seed)
    return model


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One training step, with dropout of its own seed; the loss before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return helpers.step(model, optimizer, seed)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    training = model.training
    found: Tensor = model.eval()(**helpers.batch(9)).logits
    model.train(training)
    return found


def life(
    adapter: drlora_torch.Adapter, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Everything that an adapter is, with the routers as it has trained them; copies."""
    return copy.deepcopy(
        {
            "lora": [parameter.detach() for parameter in adapter.lora_parameters()],
            "routers": trained_values(state_of(adapter)),
            "tables": {
                name: (layer.lora.table.owner, layer.lora.table.position)
                for name, layer in adapter.layers.items()
            },
            "engine": adapter.engine.state_dict(),
            "ages": state_of(adapter).ages,
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "skipped": adapter.skipped_steps,
        }
    )


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit, leaf by leaf."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Tensor):
        return helpers.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    return bool(left == right)
