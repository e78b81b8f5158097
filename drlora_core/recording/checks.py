"""Checks of a recording's arrays, and building one from arrays by layer.

Shapes: as in :mod:`drlora_core.recording.data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.config import AllocatorConfig
from drlora_core.errors import LayoutError, StatisticError
from drlora_core.recording import schema

if TYPE_CHECKING:
    from drlora_core.recording.data import Recording

ByLayer = Mapping[str, ArrayLike]


def check(recording: Recording) -> None:
    """Refuse arrays that do not fit together, holes, and values that no run can have.

    Raises:
        LayoutError: shapes.
        StatisticError: naming layer, step and value.
    """
    steps, experts, layers = recording.steps, recording.num_experts, len(recording.layers)
    if not recording.layers or min(recording.layers.values()) < 1:
        raise LayoutError("a recording needs at least one layer, and an expert in every layer")
    wanted = {
        "routing": (steps, experts),
        "importance": (steps, experts),
        "ranks": (steps, experts),
        "tokens": (steps, layers),
        "presence": (steps, layers),
    }
    for name, shape in wanted.items():
        array = getattr(recording, name)
        if array is not None and array.shape != shape:
            raise LayoutError(f"{name} of the recording has shape {array.shape}, not {shape}")
    if (dimensions := recording.dimensions) is not None and dimensions.shape[:2] != wanted["ranks"]:
        raise LayoutError(f"dimensions of the recording have shape {dimensions.shape}")
    _check_values(recording)


def _check_values(recording: Recording) -> None:
    presence = recording.presence
    bits = schema.SAMPLED | schema.ROUTING | schema.IMPORTANCE | schema.DIMENSIONS
    _refuse_layers(recording, presence > bits, presence, "presence")
    sizes = list(recording.layers.values())
    for name, bit in (("routing", schema.ROUTING), ("importance", schema.IMPORTANCE)):
        given = np.repeat((presence & bit) > 0, sizes, axis=1)
        values = getattr(recording, name)
        _refuse(recording, given & ~((values >= 0.0) & (values < np.inf)), values, name)
    if recording.ranks is not None:
        largest = np.iinfo(np.int32).max
        if recording.config is not None:
            largest = recording.config.r_max
        wrong = (recording.ranks < 1) | (recording.ranks > largest)
        _refuse(recording, wrong, recording.ranks, "ranks")
    _refuse_layers(recording, recording.tokens < schema.UNKNOWN_TOKENS, recording.tokens, "tokens")
    if recording.dimensions is not None:
        values = recording.dimensions  # NaN: the dimension is not there (any more)
        _refuse(recording, (values < 0.0) | np.isinf(values), values, "dimensions")


def _refuse(recording: Recording, wrong: NDArray[np.bool_], values: Any, what: str) -> None:
    """Name the first wrong value of an array over [T, E, ...]."""
    if not wrong.any():
        return
    row, expert, *rest = (int(number) for number in np.argwhere(wrong)[0])
    for layer, part in recording.slices().items():
        if part.start <= expert < part.stop:
            index, value = [expert - part.start, *rest], values[(row, expert, *rest)]
            raise StatisticError(
                f"layer {layer!r}, step {row + 1}: {what}{index} is {value}, which no run records"
            )


def _refuse_layers(recording: Recording, wrong: NDArray[np.bool_], values: Any, what: str) -> None:
    """Name the first wrong value of an array over [T, L]."""
    if wrong.any():
        row, position = (int(number) for number in np.argwhere(wrong)[0])
        layer = list(recording.layers)[position]
        raise StatisticError(
            f"layer {layer!r}, step {row + 1}: {what} is {values[row, position]}, "
            f"which no run records"
        )


def build(
    cls: type[Recording],
    routing: ByLayer | None,
    importance: ByLayer | None,
    tokens: ArrayLike | None,
    ranks: ByLayer | None,
    dimensions: ByLayer | None,
    config: AllocatorConfig | None,
) -> Recording:
    """See :meth:`Recording.from_arrays`."""
    given = {"routing": routing, "importance": importance, "ranks": ranks, "dimensions": dimensions}
    arrays = {
        what: {name: _array(what, name, values) for name, values in by_layer.items()}
        for what, by_layer in given.items()
        if by_layer is not None
    }
    if not any(arrays.values()):
        raise LayoutError("give routing or importance of at least one layer: {name: [steps, N]}")
    first = next(iter(arrays.values()))
    shapes = {name: array.shape[:2] for name, array in first.items()}
    for what, by_layer in arrays.items():
        _check_same_layers(what, by_layer, shapes)
    steps = {shape[0] for shape in shapes.values()}
    if len(steps) > 1:
        raise LayoutError(f"layers have different numbers of steps: {sorted(steps)}")
    layers = {name: shape[1] for name, shape in shapes.items()}
    flat = {what: _joined(what, by_layer) for what, by_layer in arrays.items()}
    absent = np.full((steps.pop(), sum(layers.values())), np.nan)
    return cls(
        layers=layers,
        routing=flat.get("routing", absent),
        importance=flat.get("importance", absent.copy()),
        presence=_presence(flat, absent.shape[0], len(layers)),
        tokens=_tokens(tokens, absent.shape[0], len(layers)),
        ranks=flat.get("ranks"),
        dimensions=flat.get("dimensions"),
        config=config,
        policy=None if config is None else config.policy,
    )


def _array(what: str, name: str, values: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StatisticError(f"layer {name!r}: {what} is not an array of numbers") from error
    wanted = 3 if what == "dimensions" else 2
    if array.ndim != wanted or 0 in array.shape:
        raise LayoutError(
            f"layer {name!r}: {what} has shape {array.shape}; accepted: [steps, experts"
            + (", r_max]" if wanted == 3 else "]")
        )
    if what == "ranks":
        whole = array.astype(np.int64)
        if not (whole == array).all():
            raise StatisticError(f"layer {name!r}: ranks are not whole numbers")
        return whole
    return array.copy()


def _check_same_layers(
    what: str, by_layer: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if list(by_layer) != list(shapes):
        raise LayoutError(
            f"{what} has the layers {list(by_layer)[:3]}, the rest {list(shapes)[:3]}; give the "
            f"same layers in the same order"
        )
    for name, array in by_layer.items():
        if array.shape[:2] != shapes[name]:
            raise LayoutError(
                f"layer {name!r}: {what} has shape {array.shape}, not [steps, experts] = "
                f"{list(shapes[name])}"
            )


def _joined(what: str, by_layer: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    depths = {array.shape[2:] for array in by_layer.values()}
    if len(depths) > 1:
        raise LayoutError(f"{what}: layers have different numbers of rank dimensions {depths}")
    return np.concatenate(list(by_layer.values()), axis=1)


def _presence(flat: Mapping[str, Any], steps: int, layers: int) -> NDArray[np.uint8]:
    bits = schema.SAMPLED
    bits |= schema.ROUTING if "routing" in flat else 0
    bits |= schema.IMPORTANCE if "importance" in flat else 0
    bits |= schema.DIMENSIONS if "dimensions" in flat else 0
    return np.full((steps, layers), bits, dtype=np.uint8)


def _tokens(tokens: ArrayLike | None, steps: int, layers: int) -> NDArray[np.int64]:
    if tokens is None:
        return np.full((steps, layers), schema.UNKNOWN_TOKENS, dtype=np.int64)
    counts = np.asarray(tokens)
    if counts.shape != (steps,) or counts.dtype.kind not in "iu":
        raise LayoutError(
            f"tokens are {counts.dtype}{list(counts.shape)}; accepted: whole numbers [{steps}]"
        )
    return np.repeat(counts.astype(np.int64)[:, None], layers, axis=1)
