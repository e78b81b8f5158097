"""Redraw rows of a LoRA while it trains: fresh rows at the timetable of growth, without growth.

Or only their optimizer state is fresh, to tell the two apart.

Shape letters: P rank slots.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.optim import Optimizer

from drlora_core import AllocatorConfig, timetable
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.step.optimizers.adam import adam_ratio

DECAY = 0.9
"""Of the average of row importance, as that of g."""
FROM_START = -1
"""Age of rows that were not redrawn."""


def choose_least(redraw: Redraw, generator: np.random.Generator, count: int) -> np.ndarray:
    """The rows of the layer with the lowest importance."""
    return redraw.candidates[np.argsort(redraw.importance[redraw.candidates])[:count]]


def choose_random(redraw: Redraw, generator: np.random.Generator, count: int) -> np.ndarray:
    """Random rows of the layer."""
    return generator.choice(redraw.candidates, count, replace=False)


def choose_extra(redraw: Redraw, generator: np.random.Generator, count: int) -> np.ndarray:
    """Random rows beyond the first r_init of their expert: those that growth would have added."""
    extra = redraw.lora.table.position[redraw.candidates] >= redraw.config.r_init
    return generator.choice(redraw.candidates[extra], count, replace=False)


class Redraw:
    """The redrawn rows of one layer; no row is redrawn twice.

    What a row has learned is lost: unlike ReLoRA, nothing is merged into the base weights.

    Attributes:
        lora: of the layer.
        config: its events and quotas are those of the redraws.
        importance: moving average of each row's sensitivity s_j, [P].
        keep_rows: rows stay as they are; only their optimizer state starts anew.
    """

    def __init__(
        self,
        lora: ExpertLoRA,
        config: AllocatorConfig,
        number: int,
        choose: Callable[[Redraw, np.random.Generator, int], np.ndarray],
        *,
        keep_rows: bool = False,
    ) -> None:
        self.lora, self.config, self._choose = lora, config, choose
        self.keep_rows = keep_rows
        self.importance = np.zeros(lora.table.num_slots)
        self._ages = np.full(lora.table.num_slots, FROM_START)
        self._generator = np.random.default_rng((config.seed, number))
        self._step = 0

    @property
    def candidates(self) -> np.ndarray:
        """Slots that may be redrawn."""
        return np.flatnonzero((self._ages == FROM_START) & (self.lora.table.owner >= 0))

    @property
    def redrawn(self) -> np.ndarray:
        """Slots that were redrawn."""
        return np.flatnonzero(self._ages != FROM_START)

    def observe(self) -> None:
        """Read the importance of rows from the gradients of the coming step."""
        now = np.zeros_like(self.importance)
        for parameter in self.lora.parameters():
            if parameter.grad is not None:
                sensitivity = (parameter.detach() * parameter.grad).abs().mean(dim=1)
                now += sensitivity.double().cpu().numpy()
        self.importance = DECAY * self.importance + (1.0 - DECAY) * now

    def corrections(self, optimizer: Optimizer) -> np.ndarray | None:
        """Factors [P] of the coming updates: as if Adam had just begun for redrawn rows."""
        if not self.redrawn.size:
            return None
        (group,) = optimizer.param_groups
        own = torch.from_numpy(self._ages[self.redrawn] + 1.0)
        factors = np.ones(self._ages.size)
        factors[self.redrawn] = adam_ratio(own, self._step + 1, group["betas"]).numpy()
        return factors

    def close(self, optimizer: Optimizer) -> None:
        """Count the step, and redraw rows if it is that of an event."""
        self._step += 1
        self._ages[self.redrawn] += 1
        config = self.config
        if self._step not in config.growth_steps:
            return
        budget = self.lora.table.num_experts * (config.r_target - config.r_init)
        event = config.growth_steps.index(self._step) + 1
        count = timetable.even_quota(event, len(config.growth_steps), budget)
        slots = self._choose(self, self._generator, count)
        if not self.keep_rows:
            self._redraw(slots)
        self._reset(slots, optimizer)
        self._ages[slots] = 0

    @torch.no_grad()
    def _redraw(self, slots: np.ndarray) -> None:
        table, rows = self.lora.table, torch.from_numpy(slots)
        # Rank dimensions that no expert reaches, so these rows of A are new.
        fresh = torch.from_numpy(table.position[slots] + table.r_max)
        owners = torch.from_numpy(table.owner[slots])
        for _, projection in self.lora.items():
            device = projection.lora_A.device
            projection.birth(rows.to(device), owners.to(device), fresh.to(device))

    def _reset(self, slots: np.ndarray, optimizer: Optimizer) -> None:
        rows = torch.from_numpy(slots)
        for parameter in self.lora.parameters():
            for value in optimizer.state.get(parameter, {}).values():
                if value.shape == parameter.shape:
                    value[rows.to(value.device)] = 0.0
