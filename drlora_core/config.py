"""The configuration of an allocation run: frozen, validated once, JSON round trip."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal, SupportsIndex, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from drlora_core import notebook
from drlora_core import timetable as timetables
from drlora_core.bounds import (
    GAMMA_BOUND,
    LARGEST_STEP,
    MOST_EVENTS,
    RANK_BOUND,
    SEED_BOUND,
    STEP_BOUND,
)
from drlora_core.errors import TimetableError, near_misses, shorten
from drlora_core.validation import reword_errors


def _whole_number(value: object) -> int:
    """Accept Python and NumPy integers; refuse bools, floats and strings."""
    try:
        if not isinstance(value, bool):
            return operator.index(cast(SupportsIndex, value))
    except TypeError:
        pass
    raise ValueError(f"must be a whole number, got {shorten(value)}")


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
Count = Annotated[WholeNumber, Field(ge=0), STEP_BOUND]
PositiveCount = Annotated[WholeNumber, Field(ge=1), STEP_BOUND]
Rank = Annotated[WholeNumber, Field(ge=0), RANK_BOUND]
PositiveRank = Annotated[WholeNumber, Field(ge=1), RANK_BOUND]
PolicyName = Literal["greedy", "rescored", "proportional", "uniform", "random", "prune", "move"]
ScopeName = Literal["layer", "global"]
TimetableName = Literal["sprout", "early", "late"]


class AllocatorConfig(BaseModel):
    """How ranks are allocated. Defaults are those of the DR-LoRA paper (arXiv 2601.04823).

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for unknown fields, values out of range, and
            combinations that cannot reach the budget. It names close fields, or the accepted range.

    Example:
        >>> config = AllocatorConfig(r_init=2, r_target=4, r_max=8, warmup_steps=10,
        ...                          growth_interval=10, growth_end=50)
        >>> config.num_events, config.growth_steps
        (4, (20, 30, 40, 50))
        >>> AllocatorConfig.model_validate_json(config.model_dump_json()) == config
        True
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    r_init: Rank = 8
    """Rank of every expert at the start (policy ``prune``: the larger rank it cuts down from). 0:
    no expert has LoRA until an event gives it rank."""
    r_target: PositiveRank = 16
    """Mean rank per expert at the end: the budget of a layer is ``num_experts * r_target``."""
    r_max: PositiveRank = 32
    """Largest rank that one expert may have."""
    warmup_steps: Count = 200
    """Optimizer steps before growth may begin; statistics are gathered from step 1 on."""
    growth_interval: PositiveCount = 200
    """Optimizer steps from one growth event to the next."""
    growth_end: Count = 2200
    """Last optimizer step at which an event may happen."""
    quota: PositiveCount | None = None
    """Rank units per event and layer; None: the budget is spread evenly over the events."""
    max_growth: PositiveCount | None = None
    """Most units one expert may get at one event; None: only ``r_max`` limits it."""
    gamma: Annotated[float, GAMMA_BOUND] = Field(default=1.0, ge=0.0)
    """Exponent of the rank penalty in the saliency, S = f * g / (r + 1)^gamma."""
    routing_decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay beta_f of the routing frequency's moving average."""
    importance_decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay beta_g of the rank importance's moving average."""
    use_routing: bool = True
    """False replaces the routing frequency f by 1 (an ablation)."""
    use_importance: bool = True
    """False replaces the rank importance g by 1 (an ablation)."""
    policy: PolicyName = "greedy"
    """Built-in policy that spreads a quota over the experts, or cuts dimensions, or does both."""
    move_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """Policy ``move`` only: largest share of a layer's rank that the first event may move."""
    r_min: Rank = 1
    """Policies ``prune`` and ``move`` only: least rank that a cut may leave an expert."""
    scope: ScopeName = "layer"
    """``layer``: a quota per layer; ``global``: one quota over all layers."""
    layer_floor: float = Field(default=0.25, ge=0.0, le=1.0)
    """Scope ``global`` only: share of its even quota that each layer gets first."""
    layer_ceiling: PositiveRank | None = None
    """Scope ``global`` only: largest mean rank of a layer; None: min(r_max, 2 * r_target)."""
    seed: Annotated[WholeNumber, Field(ge=0), SEED_BOUND] = 0
    """Seed of policy ``random`` and of the rows of A in drlora_torch."""

    @classmethod
    def for_training(
        cls, steps: int, *, timetable: TimetableName = "sprout", events: int = 8, **fields: Any
    ) -> AllocatorConfig:
        """Choose the growth steps for a training of ``steps`` optimizer steps.

        Ranks that grow early have more steps left to learn in, and rank dimensions that start
        together end up alike (docs/results.md).

        Args:
            steps: optimizer steps of the training.
            timetable: ``sprout``: events between 5 % and 25 % of the steps, from ``r_init`` 1;
                ``early``: the same from half of ``r_target``; ``late``: 10 % and 60 %, from half of
                it too. Policy ``prune`` starts from twice ``r_target``.
            events: number of events; fewer if there are too few steps.
            **fields: any other fields; what is given of a timetable's replaces it. The default of
                ``max_growth`` here lets an expert that gets rank at every event reach ``r_max`` at
                the last one.

        Raises:
            TimetableError: ``steps`` or ``events`` out of range, or an unknown timetable or
                argument.
            ValueError: a step is not a whole number.
            pydantic.ValidationError: as the class itself.

        Example:
            >>> config = AllocatorConfig.for_training(1000, r_target=16, r_max=32)
            >>> config.growth_steps, config.r_init, config.max_growth
            ((75, 100, 125, 150, 175, 200, 225, 250), 1, 4)
        """
        for name, value, most in (("steps", steps, LARGEST_STEP), ("events", events, MOST_EVENTS)):
            if _whole_number(value) < 1:
                raise TimetableError(f"{name} must be at least 1, got {shorten(value)}")
            if value > most:
                raise TimetableError(f"{name} must be at most {most:,}, got {shorten(value)}")
        known = [*cls.model_fields, "timetable", "events"]
        for name in fields.keys() - set(known):
            raise TimetableError(f"no argument {name!r}; {near_misses(name, known)}")
        chosen = {**_by_timetable(steps, timetable, events, fields), **fields}
        config = cls.model_validate(chosen)
        if "max_growth" in fields or config.policy in ("uniform", "prune") or not config.num_events:
            return config
        cap = timetables.growth_cap(config.r_init, config.r_max, config.num_events)
        return cls.model_validate({**chosen, "max_growth": cap})

    @property
    def starting_rank(self) -> int:
        """Rank of every expert before the first event."""
        return self.r_target if self.policy == "uniform" else self.r_init

    @property
    def cuts(self) -> bool:
        """True for the policies that cut single rank dimensions, ``prune`` and ``move``."""
        return self.policy in ("prune", "move")

    @property
    def ranks_change(self) -> bool:
        """False for static LoRA: every event would leave the ranks as they are."""
        return self.policy == "move" or self.starting_rank != self.r_target

    @property
    def least_rank(self) -> int:
        """Least rank that an expert can ever have; those given to policy ``uniform`` are any."""
        if self.policy == "uniform":
            return 0
        return min(self.r_min, self.r_init) if self.cuts else self.r_init

    @property
    def growth_steps(self) -> tuple[int, ...]:
        """The optimizer steps, counted from 1, after which an event happens (T_grow)."""
        return tuple(self._events())

    @property
    def num_events(self) -> int:
        """K, the number of growth events."""
        return len(self._events())

    @property
    def mean_rank_ceiling(self) -> int:
        """Largest mean rank that a layer can ever have: its rank slots per expert."""
        if self.policy == "prune":
            return self.r_init
        if self.scope == "layer":
            return self.r_target
        return self.layer_ceiling or min(self.r_max, 2 * self.r_target)

    def scheduled_total(self, num_experts: int, event: int) -> int:
        """Total rank of ``num_experts`` experts after event k (0: the start), if no limit binds.

        Example:
            >>> config = AllocatorConfig(r_init=2, r_target=4, r_max=8, warmup_steps=0,
            ...                          growth_interval=5, growth_end=15)
            >>> [config.scheduled_total(2, event) for event in range(4)]
            [4, 5, 6, 8]
        """
        start, target = num_experts * self.starting_rank, num_experts * self.r_target
        if event == 0:
            return start
        if self.policy == "prune":
            return timetables.cubic_total(event, self.num_events, start, target)
        if self.quota is not None:
            return min(start + event * self.quota, target)
        return start + event * (target - start) // self.num_events

    def _events(self) -> range:
        return timetables.growth_steps(self.warmup_steps, self.growth_interval, self.growth_end)

    def _repr_html_(self) -> str:
        steps = self._events()
        title = f"AllocatorConfig: {notebook.count(len(steps), 'growth event')}"
        if steps:
            title += f", after steps {steps[0]} to {steps[-1]}"
        return notebook.html_table(title, ("field", "value"), self.model_dump().items())

    @model_validator(mode="after")
    def _is_feasible(self) -> AllocatorConfig:
        self._check_ranks()
        if self.num_events > MOST_EVENTS:
            raise ValueError(
                f"growth_interval {self.growth_interval} up to growth_end {self.growth_end} makes "
                f"{self.num_events:,} growth events; accepted: at most {MOST_EVENTS:,}"
            )
        if self.scope == "global" and self.layer_ceiling is not None:
            self._check_ceiling(self.layer_ceiling)
        if self.policy == "move" and self.scope == "global":
            raise ValueError(
                "policy 'move' moves rank within a layer, so it cannot be combined with scope "
                "'global'; use scope 'layer'"
            )
        if self.ranks_change:
            self._check_window()
        return self

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    def _check_ranks(self) -> None:
        for name, rank in (("r_target", self.r_target), ("r_init", self.r_init)):
            if rank > self.r_max:
                raise ValueError(f"{name} {rank} > r_max {self.r_max}; use r_max >= {rank}")
        if self.policy == "prune" and self.r_init < self.r_target:
            raise ValueError(
                f"policy 'prune' cuts from r_init down to r_target, but r_init {self.r_init} < "
                f"r_target {self.r_target}; use r_init >= {self.r_target}, e.g. {2 * self.r_target}"
            )
        if self.policy != "prune" and self.r_init > self.r_target:
            raise ValueError(
                f"r_init {self.r_init} > r_target {self.r_target}: ranks only grow; use "
                f"r_init <= {self.r_target}, or policy 'prune'"
            )

        if self.cuts and self.r_min > self.r_target:
            raise ValueError(
                f"r_min {self.r_min} > r_target {self.r_target}: the budget has no room for it; "
                f"use r_min <= {self.r_target}"
            )

    def _check_ceiling(self, ceiling: int) -> None:
        if self.policy in ("uniform", "prune"):
            raise ValueError(
                f"layer_ceiling has no meaning for policy {self.policy!r}; leave it out"
            )
        if not self.r_target <= ceiling <= self.r_max:
            raise ValueError(
                f"layer_ceiling {ceiling} must lie between r_target {self.r_target} and r_max "
                f"{self.r_max}"
            )

    def _check_window(self) -> None:
        if (events := self.num_events) == 0:
            static = "policy 'uniform'" if self.policy == "move" else "r_init = r_target"
            raise ValueError(
                f"no growth event: none of the steps {self.warmup_steps} < t <= {self.growth_end} "
                f"is warmup_steps plus a multiple of growth_interval {self.growth_interval}; use "
                f"growth_end >= {self.warmup_steps + self.growth_interval}, or {static}"
            )
        if self.policy == "prune" or self.quota is not None or self.max_growth is None:
            return
        needed, most = self.r_target - self.r_init, self.max_growth * events
        if most < needed:
            raise ValueError(
                f"the budget is out of reach: max_growth {self.max_growth} x {events} events = "
                f"{most} < {needed} = r_target - r_init; use max_growth >= {-(-needed // events)} "
                f"or more events"
            )


def _by_timetable(
    steps: int, timetable: str, events: int, given: Mapping[str, Any]
) -> dict[str, int]:
    """Choose the window of growth, which takes what is given of it into account, and r_init."""
    if timetable not in timetables.TIMETABLES:
        hint = near_misses(timetable, timetables.TIMETABLES)
        raise TimetableError(f"no timetable {timetable!r}; {hint}")
    named = timetables.TIMETABLES[timetable]
    start, end = round(named.start * steps), round(named.end * steps)
    warmup = _whole_number(given.get("warmup_steps", start))
    last = _whole_number(given.get("growth_end", max(end, start + 1)))
    interval, last = timetables.even_events(warmup, last, events)
    window = {"warmup_steps": warmup, "growth_interval": interval, "growth_end": last}
    return {**window, "r_init": _starting_rank(named.r_init, given)}


def _starting_rank(named: int | None, given: Mapping[str, Any]) -> int:
    """r_init where none is given: that of the timetable, or half of the budget; prune: twice."""
    target, most = (
        _whole_number(given.get(name, AllocatorConfig.model_fields[name].default))
        for name in ("r_target", "r_max")
    )
    if given.get("policy") == "prune":
        return min(2 * target, most)
    return max(target // 2, 1) if named is None else named
