"""The allocation engine: the only stateful object of drlora_core, a thin shell over pure functions.

Shapes: L layers, N experts of a layer, R = r_max rank dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drlora_core import events, frames, new_layers, notebook, profiles, samples, snapshot
from drlora_core.config import AllocatorConfig
from drlora_core.driver import Driver
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, check_layer
from drlora_core.events import GrowthEvent
from drlora_core.policies import GROWTH_POLICIES, Policy, check_callable, policy_name
from drlora_core.profiles import Statistics
from drlora_core.recording.writer import Recorder, RecordingWriter
from drlora_core.samples import Given, Tokens
from drlora_core.state import (
    EVERYWHERE,
    Place,
    Sample,
    State,
    check_all_observed,
    check_unobserved,
    expert_saliency,
    make_state,
    observe,
    rank_importance,
    routing_frequency,
)


class AllocatorEngine:
    """Collects statistics of experts and decides at growth events which experts get rank.

    Args:
        config: the configuration.
        policy: your own callable, which replaces ``config.policy``; see
            :class:`drlora_core.policies.Policy`. A built-in policy is named in ``config``.

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
        check_callable(policy)
        if policy is not None and config.cuts:
            raise LayoutError(
                f"policy {config.policy!r} cuts rank and cannot be combined with a callable"
            )
        self.config = config
        self.driver = Driver()  # the model that the engine decides for, if any
        self._policy = GROWTH_POLICIES.get(config.policy) if policy is None else policy
        self._starts: dict[str, IntArray] = {}  # starting ranks by layer, [N]
        self._last_state: State | None = None  # None: made of the starting ranks when it is needed
        self._carry: tuple[int, ...] = ()
        self._step = 0
        self._recorder: Recorder | None = None
        self._close_step: Callable[[], None] | None = None

    @classmethod
    def from_profile(
        cls, config: AllocatorConfig, statistics: Statistics, policy: str | Policy = "sieve"
    ) -> AllocatorEngine:
        """Make an engine whose experts start with the ranks that a profile gives them.

        :mod:`drlora_core.profiles` describes both. Ranks of policy ``uniform`` stay; growing ones
        need ``r_init=0`` and place what is left.

        Raises:
            LayoutError, PolicyError, StatisticError: the profile or its ranks do not fit.

        Example:
            >>> config = AllocatorConfig(r_init=0, r_target=4, r_max=16, policy="uniform")
            >>> engine = AllocatorEngine.from_profile(config, {"a": ([0.1, 0.5, 0.4], None)})
            >>> engine.ranks("a").tolist()
            [0, 12, 0]
        """
        engine = cls(config)
        for name, ranks in profiles.starting_ranks(config, statistics, policy).items():
            engine.add_layer(name, ranks.size, ranks=ranks)
        return engine

    def __repr__(self) -> str:
        return f"AllocatorEngine({self._describe()})"

    def _repr_html_(self) -> str:
        return notebook.layers_table(f"AllocatorEngine: {self._describe()}", self._known_ranks())

    def add_layer(self, name: str, num_experts: int, *, ranks: ArrayLike | None = None) -> None:
        """Add a layer; all layers are added before the first sample.

        Args:
            name: the layer.
            num_experts: N.
            ranks: starting ranks, integers [N] from ``config.least_rank`` to ``r_max``, say those
                that another run ended with; default ``config.starting_rank`` for every expert.

        Raises:
            LayoutError: the name is taken or not a str, ``num_experts`` is not a whole number
                above 0, or too large for the memory of an engine, the ranks are out of range or
                above the budget, or a sample was already taken.
        """
        self.driver.check("add_layer")
        self.settle()
        new_layers.check_layer(self.config, name, num_experts, self._starts)
        if self._step or (self._last_state is not None and self._last_state.observed.any()):
            raise LayoutError(f"layer {name!r} comes too late: add it before the first sample")
        start = np.full(int(num_experts), self.config.starting_rank, dtype=np.int64)
        if ranks is not None:
            start = new_layers.check_ranks(self.config, start, ranks)
        self._starts[name], self._last_state = start, None
        self._carry = (0,) if self.config.scope == "global" else (0,) * len(self._starts)
        new_layers.report_shortfall(self.config, name, start)

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
        self.driver.check("observe")
        state = self._state
        self._check_unobserved(name)
        sample = self._check(name, routing, importance)
        observe(state, self.config, state.places[name], sample)
        if self._recorder is not None:
            self._recorder.sample(name, routing, importance, tokens)

    def observe_all(self, *, routing: Given, importance: Given, tokens: Tokens = None) -> None:
        """Take the samples of all layers of the current optimizer step in one call.

        The averages are those of :meth:`observe` for each layer, bit for bit. A layer that a
        mapping leaves out is skipped, as by :meth:`skip`.

        Args:
            routing: phi, float [L, N] if all layers have N experts, with the layers in the order of
                ``layer_names``; or a mapping from layer name to [N]. None only with
                ``use_routing=False``.
            importance: float [L, N] or [L, N, R], or a mapping from layer name to [N] or [N, R];
                None only with ``use_importance=False``.
            tokens: counted tokens: one number for all layers, one for each, or a mapping from layer
                name; only written to a recording.

        Raises:
            UnknownLayerError, StatisticError, StepOrderError: the engine is unchanged.

        Example:
            >>> engine = AllocatorEngine(AllocatorConfig())
            >>> engine.add_layer("layers.0", num_experts=2)
            >>> engine.add_layer("layers.1", num_experts=2)
            >>> engine.observe_all(routing=[[0.75, 0.25], [0.5, 0.5]], importance=np.ones((2, 2)))
            >>> engine.routing_frequency("layers.0").round(3).tolist()
            [0.75, 0.25]
        """
        self.driver.check("observe_all")
        state, layers = self._state, self.layer_names
        phi = samples.split_layers("routing", routing, layers)
        scores = samples.split_layers("importance", importance, layers)
        counts = samples.split_tokens(tokens, layers)
        given = samples.pair(phi, scores, layers)
        if state.observed.any():
            self._check_unobserved(layers[int(state.observed.argmax())])
        together = samples.check_together(state, self.config, routing, importance)
        if together is not None:
            observe(state, self.config, EVERYWHERE, together)
        else:
            checked = {name: self._check(name, *pair) for name, pair in given.items()}
            for name, sample in checked.items():
                observe(state, self.config, state.places[name], sample)
        state.observed[:] = True
        if self._recorder is not None:
            for name, pair in given.items():
                self._recorder.sample(name, *pair, counts.get(name))

    def skip(self, name: str) -> None:
        """Close the current step for this layer without a sample (say, after a NaN)."""
        self.driver.check("skip")
        self._check_unobserved(name)
        self._state.observed[self._place(name).layer] = True

    def is_observed(self, name: str) -> bool:
        """True if the current step's sample of a layer was taken or skipped."""
        return bool(self._state.observed[self._place(name).layer])

    def step(self) -> GrowthEvent | None:
        """Close an optimizer step; return the growth event that follows it, or None.

        Raises:
            StepOrderError: there is no layer, or one was not observed.
            PolicyError: the policy broke its contract; the engine is unchanged.
        """
        self.driver.check("step")
        state, step = self._state, self._step + 1
        check_all_observed(state, step)
        event, after, carry = events.decide(self.config, self._policy, state, self._carry, step)
        if self._recorder is not None:
            ranks = {name: state.ranks[experts] for name, (_, experts) in state.places.items()}
            self._recorder.step(step, ranks, event)
        self._last_state = dataclasses.replace(after, observed=np.zeros_like(after.observed))
        self._carry, self._step = carry, step
        return event

    def defer(self, close: Callable[[], None]) -> None:
        """Let ``close`` finish the current step as soon as the engine is asked for anything.

        On a GPU the statistics of a step arrive some time after the step. A training loop that
        waited for them would stop the GPU. With ``defer`` it goes on, and still nobody who holds
        the engine sees stale numbers: every method and property that depends on the step first
        calls ``close``. Only ``config``, ``layer_names``, ``num_experts``, ``budget`` and
        ``pending`` do not.

        Args:
            close: calls :meth:`observe_all` (or :meth:`observe` and :meth:`skip`) and :meth:`step`.
                It is called once, by the next ``defer`` at the latest. What it raises reaches the
                caller whose question it answers; it is not called again.

        Example:
            >>> engine = AllocatorEngine(AllocatorConfig())
            >>> engine.add_layer("experts", num_experts=2)
            >>> def close() -> None:
            ...     engine.observe("experts", routing=[0.75, 0.25], importance=[1.0, 1.0])
            ...     engine.step()
            >>> engine.defer(close)
            >>> engine.pending, engine.step_count, engine.pending
            (True, 1, False)
        """
        self.settle()
        self._close_step = close

    def settle(self) -> None:
        """Finish the step that :meth:`defer` left open, if there is one."""
        if self._close_step is not None:
            close, self._close_step = self._close_step, None  # its own calls settle too
            close()

    @property
    def pending(self) -> bool:
        """True if :meth:`defer` left a step open; to ask does not finish it."""
        return self._close_step is not None

    @property
    def step_count(self) -> int:
        """Number of optimizer steps so far, t."""
        self.settle()
        return self._step

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers in the order they were added."""
        return tuple(self._starts)

    def num_experts(self, name: str) -> int:
        """N of a layer."""
        check_layer(name, self._starts)
        return self._starts[name].size

    def ranks(self, name: str) -> IntArray:
        """Active ranks r_i, int64 [N] (a copy)."""
        return self._state.ranks[self._place(name).experts].copy()

    def saliency(self, name: str) -> FloatArray:
        """S_i = f_i * g_i / (r_i + 1)^gamma, float64 [N]."""
        return expert_saliency(self._state, self.config, self._place(name))

    def routing_frequency(self, name: str) -> FloatArray:
        """f_i, bias-corrected, float64 [N]; 0 before the first sample."""
        return routing_frequency(self._state, self.config, self._place(name))

    def rank_importance(self, name: str) -> FloatArray:
        """g_i, bias-corrected, float64 [N]; 0 before the first sample since the last growth."""
        return rank_importance(self._state, self.config, self._place(name))

    def budget(self, name: str) -> int:
        """Total rank of a layer at the end, N * r_target (scope ``global``: on average)."""
        return self.num_experts(name) * self.config.r_target

    def to_frame(self) -> Any:
        """Return a pandas DataFrame with a row per layer and expert.

        Columns: layer, expert, rank, routing_frequency (f), rank_importance (g), saliency (S).

        Raises:
            DRLoRAError: pandas is not installed.
        """
        return frames.experts_frame(self._state, self.config)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain arrays and JSON values, all of them copies.

        This flushes a recording, so that a run resumed from this state can continue it.
        """
        state = self._state
        if self._recorder is not None:
            self._recorder.flush()
        return snapshot.save_state(self.config, state, self._carry, self._step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state. An engine without layers takes the layers of the state.

        Raises:
            LayoutError: the state does not fit or is damaged; the engine is unchanged.
        """
        self.driver.check("load_state_dict")
        self.settle()
        loaded, carry, step = snapshot.load_state(state, self.config)
        if self._starts:
            own = {name: start.size for name, start in self._starts.items()}
            snapshot.check_layout(loaded.sizes, own)
        self._starts = {name: loaded.ranks[part] for name, (_, part) in loaded.places.items()}
        self._last_state, self._carry, self._step = loaded, carry, step

    def record_to(self, recorder: Recorder | str | os.PathLike[str] | None) -> None:
        """Tell every accepted sample and step to a recorder from now on; None stops.

        A path means a recording on disk (:mod:`drlora_core.recording`). It is created at the first
        step, and complete after ``record_to(None)`` or at the end of the process.
        """
        self.settle()
        if isinstance(recorder, (str, os.PathLike)):
            recorder = RecordingWriter(recorder, self, policy=self._policy_name())
        if self._recorder is not None and self._recorder is not recorder:
            self._recorder.close()
        self._recorder = recorder

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold a finished step: a pending one would change this engine only."""
        self.settle()
        return self.__dict__

    @property
    def _state(self) -> State:
        """The state, after a deferred step; every reader and writer of the state comes by here."""
        self.settle()
        if self._last_state is None:
            self._last_state = make_state(self.config, self._starts)
        return self._last_state

    def _policy_name(self) -> str:
        return self.config.policy if self._policy is None else policy_name(self._policy)

    def _known_ranks(self) -> dict[str, IntArray]:
        """Ranks [N] by layer without the deferred step: to show an engine closes no step."""
        state = self._last_state
        if state is None:
            return self._starts
        return {name: state.ranks[experts] for name, (_, experts) in state.places.items()}

    def _describe(self) -> str:
        ranks, target = self._known_ranks(), self.config.r_target
        return notebook.describe_engine(
            self._policy_name(), self._step, self.pending, ranks, target
        )

    def _place(self, name: str) -> Place:
        check_layer(name, self._starts)
        return self._state.places[name]

    def _check_unobserved(self, name: str) -> None:
        check_unobserved(self._state, self._place(name).layer, name, self._step + 1)

    def _check(self, name: str, routing: ArrayLike | None, importance: ArrayLike | None) -> Sample:
        state, where = self._state, f"layer {name!r}, step {self._step + 1}"
        ranks = state.ranks[state.places[name].experts]
        return samples.check_one(where, ranks, self.config, routing, importance)
