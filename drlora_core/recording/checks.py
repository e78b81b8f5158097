"""Checks of a recording's arrays, and joining the arrays of its layers.

Shapes: T steps, L layers, E experts of all layers one after the other, N experts of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.errors import LayoutError, StatisticError
from drlora_core.recording import header

ByLayer = Mapping[str, ArrayLike]


def slices(layers: Mapping[str, int]) -> dict[str, slice]:
    """Where each layer's experts lie in the arrays over E."""
    ends = np.cumsum(list(layers.values())).tolist()
    sizes = layers.items()
    return {name: slice(end - size, end) for (name, size), end in zip(sizes, ends, strict=True)}


def check(layers: Mapping[str, int], arrays: Mapping[str, Any], largest_rank: int | None) -> None:
    """Refuse arrays that do not fit together, and values that no run can have.

    Args:
        layers: experts of each layer.
        arrays: those of a recording by name; None where there is none.
        largest_rank: r_max, where it is known.

    Raises:
        LayoutError: shapes.
        StatisticError: naming layer, step and value.
    """
    if not layers or min(layers.values()) < 1:
        raise LayoutError("a recording needs at least one layer, and an expert in every layer")
    presence, sizes = arrays["presence"], list(layers.values())
    for name, array in arrays.items():
        columns = len(layers) if name in ("tokens", "presence") else sum(sizes)
        shape = (presence.shape[0], columns)
        if array is not None and array.shape[:2] != shape:
            raise LayoutError(f"{name} of the recording has shape {array.shape}, not {shape}")
    bits = header.SAMPLED + sum(header.BITS.values())
    wrong = {"presence": presence > bits, "tokens": arrays["tokens"] < header.UNKNOWN_TOKENS}
    for name in ("routing", "importance"):
        given = np.repeat((presence & header.BITS[name]) > 0, sizes, axis=1)
        wrong[name] = given & ~((arrays[name] >= 0.0) & (arrays[name] < np.inf))
    if (ranks := arrays["ranks"]) is not None:
        wrong["ranks"] = (ranks < 1) | (ranks > (largest_rank or np.iinfo(np.int32).max))
    if (values := arrays["dimensions"]) is not None:  # NaN: the dimension is not there (any more)
        wrong["dimensions"] = (values < 0.0) | np.isinf(values)
    for name, found in wrong.items():
        if found.any():
            raise StatisticError(_describe(layers, name, arrays[name], found))


def _describe(
    layers: Mapping[str, int], what: str, values: NDArray[Any], wrong: NDArray[np.bool_]
) -> str:
    """Name the first wrong value."""
    row, column, *rest = (int(number) for number in np.argwhere(wrong)[0])
    value = values[(row, column, *rest)]
    if what in ("tokens", "presence"):
        layer, index = list(layers)[column], ""
    else:
        parts = slices(layers)
        layer = next(name for name, part in parts.items() if column < part.stop)
        index = str([column - parts[layer].start, *rest])
    return f"layer {layer!r}, step {row + 1}: {what}{index} is {value}, which no run records"


def join(
    given: Mapping[str, ByLayer | None], tokens: ArrayLike | None
) -> tuple[dict[str, int], dict[str, Any]]:
    """Put the layers' arrays side by side.

    Args:
        given: arrays [T, N] or [T, N, R] by name and layer.
        tokens: counted tokens of each step, int [T].

    Returns:
        Experts of each layer, and the arrays over all of them, with ``presence`` and ``tokens``.
    """
    by_name = {
        what: {layer: _array(what, layer, values) for layer, values in by_layer.items()}
        for what, by_layer in given.items()
        if by_layer is not None
    }
    if not any(by_name.values()):
        raise LayoutError("give routing or importance of at least one layer: {name: [steps, N]}")
    shapes = {layer: array.shape[:2] for layer, array in next(iter(by_name.values())).items()}
    for what, by_layer in by_name.items():
        _check_same_layers(what, by_layer, shapes)
    steps = {shape[0] for shape in shapes.values()}
    if len(steps) > 1:
        raise LayoutError(f"layers have different numbers of steps: {sorted(steps)}")
    flat = {what: np.concatenate(list(parts.values()), axis=1) for what, parts in by_name.items()}
    shape = (steps.pop(), len(shapes))
    bits = header.SAMPLED + sum(bit for name, bit in header.BITS.items() if name in flat)
    flat["presence"] = np.full(shape, bits, dtype=np.uint8)
    flat["tokens"] = _tokens(tokens, shape)
    for name in ("routing", "importance"):
        flat.setdefault(name, np.full((shape[0], sum(n for _, n in shapes.values())), np.nan))
    return {layer: experts for layer, (_, experts) in shapes.items()}, flat


def _array(what: str, layer: str, values: ArrayLike) -> NDArray[Any]:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StatisticError(f"layer {layer!r}: {what} is not an array of numbers") from error
    accepted = "[steps, experts, r_max]" if what == "dimensions" else "[steps, experts]"
    if array.ndim != accepted.count(",") + 1 or 0 in array.shape:
        raise LayoutError(f"layer {layer!r}: {what} has shape {array.shape}; accepted: {accepted}")
    if what != "ranks":
        return array
    if not (array.astype(np.int64) == array).all():
        raise StatisticError(f"layer {layer!r}: ranks are not whole numbers")
    return array.astype(np.int64)


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
    if len(depths := {array.shape[2:] for array in by_layer.values()}) > 1:
        raise LayoutError(f"{what}: layers have different numbers of rank dimensions {depths}")


def _tokens(tokens: ArrayLike | None, shape: tuple[int, int]) -> NDArray[np.int64]:
    if tokens is None:
        return np.full(shape, header.UNKNOWN_TOKENS, dtype=np.int64)
    counts = np.asarray(tokens)
    if counts.shape != shape[:1] or counts.dtype.kind not in "iu":
        raise LayoutError(
            f"tokens are {counts.dtype}{list(counts.shape)}; accepted: whole numbers [{shape[0]}]"
        )
    return np.repeat(counts.astype(np.int64)[:, None], shape[1], axis=1)
