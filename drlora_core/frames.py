"""Ranks, statistics and growth events as pandas DataFrames, one row per layer and expert.

pandas is imported here alone, when a frame is asked for. Shapes: E experts of all layers, one layer
after the other, N experts of a layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError
from drlora_core.events import GrowthEvent
from drlora_core.state import State, expert_saliency, rank_importance, routing_frequency

EVENT_FIELDS = {"delta": "deltas", "rank": "ranks", "saliency": "saliency"}


def experts_frame(state: State, config: AllocatorConfig) -> Any:
    """Return a row per expert: layer, expert, rank, routing_frequency, rank_importance, saliency.

    Raises:
        DRLoRAError: pandas is not installed.
    """
    return _import_pandas().DataFrame(
        _number_experts(state.sizes)
        | {
            "rank": state.ranks.copy(),
            "routing_frequency": routing_frequency(state, config),
            "rank_importance": rank_importance(state, config),
            "saliency": expert_saliency(state, config),
        }
    )


def events_frame(events: Iterable[GrowthEvent]) -> Any:
    """Return a row per event and expert: event, step, layer, expert, delta, rank, saliency.

    ``delta`` is the change of the rank, ``rank`` the one after the event, ``saliency`` that before
    it.

    Raises:
        DRLoRAError: pandas is not installed.

    Example:
        >>> event = GrowthEvent(step=7, index=1, unplaced=0, cut={}, deltas={"a": np.array([2, 0])},
        ...     ranks={"a": np.array([3, 1])}, saliency={"a": np.array([0.5, 0.25])})
        >>> events_frame([event]).groupby("step")["delta"].sum().to_dict()
        {7: 2}
    """
    pandas = _import_pandas()
    parts = [_event_frame(pandas, event) for event in events]
    empty = GrowthEvent(step=0, index=0, deltas={}, ranks={}, saliency={}, unplaced=0, cut={})
    return pandas.concat(parts or [_event_frame(pandas, empty)], ignore_index=True)


def _event_frame(pandas: Any, event: GrowthEvent) -> Any:
    places = _number_experts({name: ranks.size for name, ranks in event.ranks.items()})
    size = places["expert"].size
    columns = {"event": np.full(size, event.index), "step": np.full(size, event.step)} | places
    for column, field in EVENT_FIELDS.items():
        none = np.zeros(0, dtype=np.float64 if field == "saliency" else np.int64)
        columns[column] = np.concatenate([none, *getattr(event, field).values()])
    return pandas.DataFrame(columns)


def _number_experts(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the layer and the number of each expert, [E]."""
    names = np.array(list(sizes), dtype=object)
    numbers = [np.arange(size) for size in sizes.values()]
    expert = np.concatenate([np.zeros(0, dtype=np.int64), *numbers])
    return {"layer": names.repeat(list(sizes.values())), "expert": expert}


def _import_pandas() -> Any:
    try:
        return importlib.import_module("pandas")
    except ModuleNotFoundError as error:
        raise DRLoRAError("data frames need pandas: pip install pandas") from error
