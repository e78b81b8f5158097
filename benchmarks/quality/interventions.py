"""Interventions: what some methods do around every optimizer step, to test why growing helps.

Each changes the rows of A and B after the library's own step, growth and newborn correction. Row s
of both belongs to rank slot s.

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import torch
from torch.optim import Optimizer

import drlora_torch
from benchmarks.quality.redrawing import Redraw, choose_extra, choose_least, choose_random
from drlora_core import AllocatorConfig
from drlora_torch.lora.layers import ExpertLoRA

Around = Callable[[Optimizer], AbstractContextManager[object]]
"""Wraps an optimizer step."""
WARMUP = 10
"""Own steps after which newborn rows move at full speed."""


@contextlib.contextmanager
def scaled_updates(
    lora: ExpertLoRA, of_A: np.ndarray | None, of_B: np.ndarray | None
) -> Iterator[None]:
    """Scale what the optimizer step inside adds to the rows of A and B by factors [P].

    None leaves the updates alone.
    """
    kept = [
        (parameter, parameter.detach().clone(), torch.from_numpy(factors).float()[:, None])
        for name, parameter in lora.named_parameters()
        if (factors := of_A if name.endswith("lora_A") else of_B) is not None
    ]
    yield
    with torch.no_grad():
        for parameter, before, factor in kept:
            parameter.copy_(torch.lerp(before, parameter, factor.to(parameter.device)))


class RankScale:
    """B A of expert i is scaled by (alpha / r_target) (r_target / r_i)^power.

    This scales the updates of B instead, which is the same under Adam: it moves B by the same
    amount whatever the scale of the gradient, so a scale of c moves c B by c times as much. (It
    would differ by Adam's epsilon, and by the weight of an expert in the clipped gradient norm.)
    At growth the function does not jump, as if B and its optimizer state were rescaled.
    """

    def __init__(
        self, adapter: drlora_torch.Adapter, config: AllocatorConfig, *, power: float
    ) -> None:
        self._adapter, self._target, self._power = adapter, config.r_target, power

    @contextlib.contextmanager
    def __call__(self, optimizer: Optimizer) -> Iterator[None]:
        """Scale the updates of B by the ranks before the step."""
        with ExitStack() as stack:
            for layer in self._adapter.layers.values():
                table = layer.lora.table
                rank = table.ranks()[table.owner]
                owned = table.owner >= 0
                factors = np.where(owned, (self._target / rank.clip(1)) ** self._power, 1.0)
                stack.enter_context(scaled_updates(layer.lora, None, factors))
            yield


class NewbornWarmup:
    """The updates of newborn rows rise from 1 / steps to 1 in their first steps."""

    def __init__(
        self, adapter: drlora_torch.Adapter, config: AllocatorConfig, *, steps: int = WARMUP
    ) -> None:
        self._adapter, self._steps = adapter, steps
        self._ages = {
            name: np.where(layer.lora.table.owner >= 0, steps, 0)
            for name, layer in adapter.layers.items()
        }

    @contextlib.contextmanager
    def __call__(self, optimizer: Optimizer) -> Iterator[None]:
        """Scale the updates of rows that have an owner, and count them."""
        owned = {n: layer.lora.table.owner >= 0 for n, layer in self._adapter.layers.items()}
        with ExitStack() as stack:
            for name, layer in self._adapter.layers.items():
                self._ages[name] += owned[name]
                factors = np.where(owned[name], (self._ages[name] / self._steps).clip(max=1.0), 1.0)
                stack.enter_context(scaled_updates(layer.lora, factors, factors))
            yield


class Redrawing:
    """At every event of the timetable, rows of A are drawn anew, and their B is 0 again.

    As many rows per event as growth adds. Their optimizer state is fresh, and their updates are
    corrected as those of newborn rows. With ``keep_rows``, only the state is fresh.
    """

    def __init__(
        self,
        adapter: drlora_torch.Adapter,
        config: AllocatorConfig,
        *,
        choose: Callable[..., np.ndarray],
        keep_rows: bool = False,
    ) -> None:
        self._redraws = [
            Redraw(layer.lora, config, number, choose, keep_rows=keep_rows)
            for number, layer in enumerate(adapter.layers.values())
        ]

    @contextlib.contextmanager
    def __call__(self, optimizer: Optimizer) -> Iterator[None]:
        """Correct the updates of redrawn rows; after the step of an event, redraw others."""
        with ExitStack() as stack:
            for redraw in self._redraws:
                redraw.observe()
                factors = redraw.corrections(optimizer)
                if factors is not None:
                    stack.enter_context(scaled_updates(redraw.lora, factors, factors))
            yield
        for redraw in self._redraws:
            redraw.close(optimizer)


INTERVENTIONS: Mapping[str, Callable[[drlora_torch.Adapter, AllocatorConfig], Around]] = {
    "scale by 1/sqrt(r)": functools.partial(RankScale, power=0.5),
    "scale by 1/r": functools.partial(RankScale, power=1.0),
    "newborn warmup": NewbornWarmup,
    "redraw least important": functools.partial(Redrawing, choose=choose_least),
    "redraw random": functools.partial(Redrawing, choose=choose_random),
    "redraw extra": functools.partial(Redrawing, choose=choose_extra),
    "reset extra": functools.partial(Redrawing, choose=choose_extra, keep_rows=True),
}
"""By name, as in ``drlora + newborn warmup``, a kind of method."""
