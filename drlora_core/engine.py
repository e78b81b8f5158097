"""The allocation engine: the only stateful object of drlora_core, a thin shell over pure functions.

Shapes: N experts of a layer, R = r_max rank dimensions.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drlora_core import events, layer, snapshot
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, StatisticError, StepOrderError, check_layer
from drlora_core.events import GrowthEvent
from drlora_core.policies import GROWTH_POLICIES, Policy, policy_name
from drlora_core.recording.writer import Recorder, RecordingWriter

logger = logging.getLogger(__name__)


class AllocatorEngine:
    """Collects statistics of experts and decides at growth events which experts get rank.

    Args:
        config: the configuration.
        policy: your own callable, which replaces ``config.policy``; see
            :class:`drlora_core.policies.Policy`.

    Example:
        >>> config = AllocatorConfig(r_init=1, r_target=2, r_max=4, warmup_steps=0,
        ...                          growth_interval=1, growth_end=1)
        >>> engine = AllocatorEngine(config)
        >>> engine.add_layer("experts", num_experts=2)
        >>> engine.observe("experts", routing=[0.9, 0.1], importance=[1.0, 1.0])
        >>> event = engine.step()
        >>> event.deltas["experts"].tolist(), engine.ranks("experts").tolist()
        ([2, 0], [3, 1])
    """

    def __init__(self, config: AllocatorConfig, *, policy: Policy | None = None) -> None:
        if not isinstance(config, AllocatorConfig):
            raise LayoutError(f"config must be an AllocatorConfig, got {type(config).__name__}")
        if policy is not None and config.policy == "prune":
            raise LayoutError("policy 'prune' cuts rank and cannot be combined with a callable")
        self.config = config
        self._policy = policy or GROWTH_POLICIES.get(config.policy)
        self._layers: dict[str, layer.LayerState] = {}
        self._carry: tuple[int, ...] = ()
        self._step = 0
        self._recorder: Recorder | None = None

    def add_layer(self, name: str, num_experts: int, *, ranks: ArrayLike | None = None) -> None:
        """Add a layer; all layers are added before the first sample.

        Args:
            name: the layer.
            num_experts: N.
            ranks: starting ranks, integers [N], say those that another run ended with; default
                ``config.starting_rank`` for every expert.

        Raises:
            LayoutError: the name is taken or not a str, ``num_experts`` is not a whole number
                above 0, the ranks are out of range or above the budget, or a sample was already
                taken.
        """
        if not isinstance(name, str):
            raise LayoutError(f"a layer name must be a str, got {name!r}")
        if name in self._layers:
            raise LayoutError(f"layer {name!r} was already added; names must be unique")
        whole = isinstance(num_experts, (int, np.integer)) and not isinstance(num_experts, bool)
        if not whole or num_experts < 1:
            raise LayoutError(f"num_experts must be a whole number above 0, got {num_experts!r}")
        if self._step or any(state.observed for state in self._layers.values()):
            raise LayoutError(f"layer {name!r} comes too late: add it before the first sample")
        state = layer.make_state(self.config, int(num_experts))
        if ranks is not None:
            state = dataclasses.replace(state, ranks=_check_start(self.config, state.ranks, ranks))
        self._layers[name] = state
        self._carry = (0,) if self.config.scope == "global" else (0,) * len(self._layers)
        self._report_shortfall(name, int(num_experts))

    def observe(
        self,
        name: str,
        *,
        routing: ArrayLike | None,
        importance: ArrayLike | None,
        tokens: int | None = None,
    ) -> None:
        """Take a layer's sample of the current optimizer step, once per step.

        Args:
            name: the layer.
            routing: phi, float [N]; None only with ``use_routing=False``.
            importance: per expert, float [N], or per rank dimension, float [N, R], of which the
                first r_i columns count; None only with ``use_importance=False``.
            tokens: counted tokens behind the sample; only written to a recording.

        Raises:
            UnknownLayerError, StatisticError, StepOrderError: the engine is unchanged.
        """
        state = self._layer(name)
        if state.observed:
            raise StepOrderError(
                f"layer {name!r} was already observed in step {self._step + 1}; average the "
                f"micro-batches, call engine.observe({name!r}, ...) once, then engine.step()"
            )
        try:
            self._layers[name] = layer.observe(state, self.config, routing, importance)
        except StatisticError as error:
            raise StatisticError(f"layer {name!r}, step {self._step + 1}: {error}") from None
        if self._recorder is not None:
            self._recorder.sample(name, routing, importance, tokens)

    def skip(self, name: str) -> None:
        """Close the current step for this layer without a sample (say, after a NaN)."""
        state = self._layer(name)
        if state.observed:
            raise StepOrderError(f"layer {name!r} was already observed in step {self._step + 1}")
        self._layers[name] = dataclasses.replace(state, observed=True)

    def is_observed(self, name: str) -> bool:
        """True if the current step's sample of a layer was taken or skipped."""
        return self._layer(name).observed

    def step(self) -> GrowthEvent | None:
        """Close an optimizer step; return the growth event that follows it, or None.

        Raises:
            StepOrderError: there is no layer, or one was not observed.
            PolicyError: the policy broke its contract; the engine is unchanged.
        """
        step = self._step + 1
        if not self._layers:
            raise StepOrderError("the engine has no layers; call engine.add_layer(...) first")
        missing = [name for name, state in self._layers.items() if not state.observed]
        if missing:
            raise StepOrderError(
                f"step {step} has no sample of {len(missing)} of {len(self._layers)} layers, first "
                f"{missing[0]!r}; call engine.observe(...) or engine.skip(name) for every layer "
                f"before engine.step()"
            )
        event, layers, carry = events.decide(
            self.config, self._policy, self._layers, self._carry, step
        )
        if self._recorder is not None:
            ranks_before = {name: state.ranks for name, state in self._layers.items()}
            self._recorder.step(step, ranks_before, event)
        self._layers = {
            name: dataclasses.replace(state, observed=False) for name, state in layers.items()
        }
        self._carry, self._step = carry, step
        return event

    @property
    def step_count(self) -> int:
        """Number of optimizer steps so far, t."""
        return self._step

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers in the order they were added."""
        return tuple(self._layers)

    def num_experts(self, name: str) -> int:
        """N of a layer."""
        return self._layer(name).num_experts

    def ranks(self, name: str) -> IntArray:
        """Active ranks r_i, int64 [N] (a copy)."""
        return self._layer(name).ranks.copy()

    def saliency(self, name: str) -> FloatArray:
        """S_i = f_i * g_i / (r_i + 1)^gamma, float64 [N]."""
        return layer.layer_saliency(self._layer(name), self.config)

    def routing_frequency(self, name: str) -> FloatArray:
        """f_i, bias-corrected, float64 [N]; 0 before the first sample."""
        return layer.routing_frequency(self._layer(name), self.config)

    def rank_importance(self, name: str) -> FloatArray:
        """g_i, bias-corrected, float64 [N]; 0 before the first sample since the last growth."""
        return layer.rank_importance(self._layer(name), self.config)

    def budget(self, name: str) -> int:
        """Total rank of a layer at the end, N * r_target (scope ``global``: on average)."""
        return self._layer(name).num_experts * self.config.r_target

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain arrays and JSON values, all of them copies.

        This flushes a recording, so that a run resumed from this state can continue it.
        """
        if self._recorder is not None:
            self._recorder.flush()
        return snapshot.save_state(self.config, self._layers, self._carry, self._step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state. An engine without layers takes the layers of the state.

        Raises:
            LayoutError: the state does not fit or is damaged; the engine is unchanged.
        """
        layers, carry, step = snapshot.load_state(state, self.config)
        if self._layers:
            snapshot.check_layout(layers, self._layers)
        self._layers, self._carry, self._step = layers, carry, step

    def record_to(self, recorder: Recorder | str | os.PathLike[str] | None) -> None:
        """Tell every accepted sample and step to a recorder from now on; None stops.

        A path means a recording on disk (:mod:`drlora_core.recording`). It is created at the first
        step, and complete after ``record_to(None)`` or at the end of the process.
        """
        if isinstance(recorder, (str, os.PathLike)):
            name = self.config.policy if self._policy is None else policy_name(self._policy)
            recorder = RecordingWriter(recorder, self, policy=name)
        if self._recorder is not None and self._recorder is not recorder:
            self._recorder.close()
        self._recorder = recorder

    def _layer(self, name: str) -> layer.LayerState:
        check_layer(name, self._layers)
        return self._layers[name]

    def _report_shortfall(self, name: str, num_experts: int) -> None:
        config = self.config
        if config.quota is None or config.policy in ("uniform", "prune"):
            return
        quota = min(config.quota, num_experts * (config.max_growth or config.r_max))
        planned, start = quota * config.num_events, num_experts * config.r_init
        budget = num_experts * config.r_target
        if start + planned < budget:
            logger.warning(
                f"layer {name!r}: quota {quota} x {config.num_events} events = {planned} < "
                f"{budget - start} needed; total rank will end at {start + planned} of {budget}"
            )


def _check_start(config: AllocatorConfig, default: IntArray, ranks: ArrayLike) -> IntArray:
    """Check starting ranks that were given, [N]."""
    given = np.asarray(ranks)
    least, budget = config.starting_rank, default.size * config.r_target
    if given.shape != default.shape or not np.issubdtype(given.dtype, np.integer):
        raise LayoutError(
            f"ranks must be integers of shape {default.shape}, got {given.dtype}{given.shape}"
        )
    if config.policy == "prune" and (given != least).any():
        raise LayoutError(f"policy 'prune' starts every expert at r_init = {least}")
    if given.min() < least or given.max() > config.r_max:
        found = f"{given.min()}..{given.max()}"
        raise LayoutError(f"starting ranks lie in {found}, not {least}..{config.r_max}")
    if config.policy != "prune" and given.sum() > budget:
        raise LayoutError(f"starting ranks sum to {given.sum()}, above the budget of {budget}")
    return given.astype(np.int64)
