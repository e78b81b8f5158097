"""A run: its recording, its decisions, and whatever else is known of it.

Shapes: K events, E experts of all layers, one layer after the other, N experts of a layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.ema import IntArray
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import Recording
from drlora_core.recording.format import split_experts
from drlora_core.replay import Replay, replay
from drlora_core.runs.history import SignalHistory, signal_history
from drlora_core.runs.metrics import Losses
from drlora_core.runs.recipe import NATS, RunRecipe
from drlora_core.runs.result import Outcome

NO_LOSSES = Losses.from_rows(())


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What figures and the report show: make one with `open_run`, `from_recording` or `as_run`."""

    name: str
    recording: Recording
    config: AllocatorConfig
    policy: str
    """Name of the policy that decided."""
    starts: Mapping[str, IntArray]
    """Ranks before the first step, int64 [N] by layer."""
    events: tuple[GrowthEvent, ...]
    """Those that could change ranks: none of static LoRA."""
    replayed: bool = False
    """The decisions are those of a replay under another configuration, not of the run itself."""
    losses: Losses = NO_LOSSES
    outcome: Outcome | None = None
    compared: tuple[tuple[str, Losses, Outcome | None], ...] = ()
    """Other methods trained beside it: name, losses, what they reached."""
    recipe: RunRecipe | None = None
    path: Path | None = None
    """Folder or file that it was read from."""

    @property
    def layers(self) -> dict[str, int]:
        """Experts of each layer."""
        return self.recording.layers

    @property
    def last_step(self) -> int:
        """Where the step axis ends: the last step that is planned, recorded or logged."""
        planned = self.recipe.steps if self.recipe is not None else 0
        return max(planned, self.recording.steps, self.losses.last_step, 1)

    @functools.cached_property
    def ranks(self) -> IntArray:
        """Ranks at the start and after each event, int64 [K + 1, E]."""
        rows = [self.starts, *(event.ranks for event in self.events)]
        return np.stack([np.concatenate([row[name] for name in self.layers]) for row in rows])

    @functools.cached_property
    def kept(self) -> int:
        """Number of the row of `ranks` that the saved adapter has.

        The last one, or an earlier one where the training went on past it (early stopping).
        """
        saved = None if self.outcome is None else self.outcome.ranks
        if saved is None or {name: len(row) for name, row in saved.items()} != self.layers:
            return len(self.events)
        row = np.concatenate([saved[name] for name in self.layers])
        same = np.flatnonzero((self.ranks == row).all(axis=1))
        return int(same[-1]) if same.size else len(self.events)

    @property
    def final(self) -> IntArray:
        """Ranks of the saved adapter, int64 [E]."""
        ranks: IntArray = self.ranks[self.kept]
        return ranks

    def history_row(self, number: int) -> int:
        """Return the row of `history` that ranks were decided by; of the last ranks, the end."""
        if number == len(self.events):
            return len(self.history.steps) - 1
        return self.history.row_at(self.events[number - 1].step if number else 0)

    @property
    def loss_unit(self) -> str:
        """What losses are counted in."""
        return NATS if self.recipe is None else self.recipe.loss_unit

    @functools.cached_property
    def history(self) -> SignalHistory:
        """f, g and S over the steps."""
        return signal_history(self.recording, self.config, self.starts, self.events)

    @property
    def event_noun(self) -> str:
        """What its events are called: those that also cut rank are no growth events."""
        return "rank event" if self.config.cuts else "growth event"

    @property
    def event_steps(self) -> list[int]:
        """The optimizer steps after which an event happened, [K]."""
        return [event.step for event in self.events]

    @property
    def places(self) -> dict[str, slice]:
        """Where each layer's experts are among all experts."""
        return split_experts(self.layers)

    @property
    def budget(self) -> int:
        """Total rank that the plan ends with."""
        return self.recording.num_experts * self.config.r_target


Drawable = Run | Recording | Replay
"""What figures draw."""


def tell_apart(one: Run, two: Run) -> Run:
    """Return the second run, with another name if both are called the same."""
    return dataclasses.replace(two, name=f"{two.name} (other)") if one.name == two.name else two


def as_run(run: Drawable) -> Run:
    """Return what figures draw: of a recording the recorded run, of a replay its decisions.

    Raises:
        LayoutError: a recording without a configuration, or whose decisions are not known.
    """
    if isinstance(run, Run):
        return run
    if isinstance(run, Recording):
        return from_recording(run)
    if isinstance(run, Replay):
        return _from_replay(run, "replay")
    raise LayoutError(f"give a Run, a Recording or a Replay, not a {type(run).__name__}")


def from_recording(
    recording: Recording, config: AllocatorConfig | None = None, name: str = "run"
) -> Run:
    """Describe a recorded run, or its replay under a configuration.

    Without a ``config`` the decisions are those that were recorded, whatever the policy was; for
    statistics without recorded decisions, those of a replay under their own configuration.

    Raises:
        LayoutError: there is no configuration, or the policy is one of the user's own and its
            decisions were not recorded.
    """
    own = config is None
    if (config := config or recording.config) is None:
        raise LayoutError("the recording has no configuration of its own; give one to replay it")
    if own and recording.events:
        starts = recording.starting_ranks or {
            layer: np.full(size, config.starting_rank, dtype=np.int64)
            for layer, size in recording.layers.items()
        }
        policy = recording.policy or config.policy
        return Run(name, recording, config, policy, starts, _changing(config, recording.events))
    result = replay(recording, config)
    if own and recording.policy not in (result.policy, None):
        raise LayoutError(
            f"the run was decided by policy {recording.policy!r}, whose code is not recorded; draw "
            f"drlora_core.replay(recording, policy=...)"
        )
    return dataclasses.replace(_from_replay(result, name), replayed=not own)


def _from_replay(result: Replay, name: str) -> Run:
    return Run(
        name=name,
        recording=result.recording,
        config=result.config,
        policy=result.policy,
        starts=result.starting_ranks,
        events=_changing(result.config, result.events),
        replayed=True,
    )


def _changing(config: AllocatorConfig, events: tuple[GrowthEvent, ...]) -> tuple[GrowthEvent, ...]:
    """Leave out the events of static LoRA, which place nothing."""
    return events if config.ranks_change else ()
