"""Routing-only traces, such as those recorded for other studies, as recordings.

Shapes: T steps, L layers, N experts per layer.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.errors import LayoutError, StatisticError
from drlora_core.recording.data import Recording
from drlora_core.state import to_floats

SMALL, UNPACKED = 2**24, 20  # bytes that any file may unpack to, and how often its own more
HEADERS: Mapping[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
ImportanceChoice = Literal["ones", "sampled"]


def from_routing_trace(
    weight_sum: ArrayLike,
    tokens: ArrayLike,
    *,
    importance: ImportanceChoice = "ones",
    seed: int = 0,
    layer_names: list[str] | None = None,
) -> Recording:
    """Make a recording of summed routing weights; phi of a step is ``weight_sum / tokens``.

    Args:
        weight_sum: routing weights summed over the tokens of a step, float [T, L, N].
        tokens: tokens of each step, int [T], all positive.
        importance: ``"ones"`` (experts differ by routing only) or ``"sampled"``: a lognormal level
            for each expert times lognormal noise for each step. Both are made up.
        seed: of ``"sampled"``.
        layer_names: default ``layers.0`` and so on.

    Raises:
        LayoutError, StatisticError: wrong shapes, or an impossible value, by step and layer.
    """
    sums, counts = to_floats("weight_sum", weight_sum), np.asarray(tokens)
    if sums.ndim != 3 or counts.shape != sums.shape[:1] or counts.dtype.kind not in "iu":
        raise LayoutError(
            f"weight_sum has shape {sums.shape}, tokens are {counts.dtype}{list(counts.shape)}; "
            f"accepted: [steps, layers, experts] and whole numbers [steps], one for each step"
        )
    if (counts < 1).any():
        step = int(np.argmax(counts < 1))
        raise StatisticError(f"step {step + 1}: tokens are {counts[step]}; accepted: 1 or more")
    names = layer_names or [f"layers.{index}" for index in range(sums.shape[1])]
    if len(names) != sums.shape[1]:
        raise LayoutError(f"{len(names)} layer names for {sums.shape[1]} layers")
    if importance == "ones":
        scores = np.ones(sums.shape)
    elif importance == "sampled":
        rng = np.random.default_rng(seed)
        level = rng.lognormal(0.0, 0.5, size=sums.shape[1:])
        scores = level * rng.lognormal(0.0, 0.25, size=sums.shape)
    else:
        raise LayoutError(f"importance {importance!r} is unknown; accepted: 'ones' or 'sampled'")
    phi = sums / counts[:, None, None]
    return Recording.from_arrays(
        {name: phi[:, index] for index, name in enumerate(names)},
        {name: scores[:, index] for index, name in enumerate(names)},
        tokens=counts,
    )


def load_trace(
    path: str | os.PathLike[str], *, importance: ImportanceChoice = "ones", seed: int = 0
) -> Recording:
    """Read a ``.npz`` file with arrays ``weight_sum`` and ``tokens``; see `from_routing_trace`.

    Raises:
        LayoutError: not such a file (nothing in it is ever unpickled), or one that would unpack to
            more than ``UNPACKED`` times its size.
        OSError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream, zipfile.ZipFile(stream) as archive:
            most = SMALL + UNPACKED * os.fstat(stream.fileno()).st_size
            weight_sum, tokens = (_read(archive, name, most) for name in ("weight_sum", "tokens"))
    except OSError:
        raise
    except Exception as error:  # ValueError, KeyError, BadZipFile, EOFError, zlib.error, ...
        what = "a routing trace, an .npz file with weight_sum and tokens"
        raise LayoutError(f"{path} is not {what}: {error}") from error
    return from_routing_trace(weight_sum, tokens, importance=importance, seed=seed)


def _read(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """Read an array of numbers that has at most so many bytes, which its header says."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version not in HEADERS:
            raise LayoutError(f"{name} has version {version} of the NumPy format")
        shape, _, dtype = HEADERS[version](member)
    if dtype.kind not in "biuf":
        raise LayoutError(f"{name} holds {dtype}; accepted: numbers")
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize > most:
        raise LayoutError(
            f"{name} has shape {shape}, whose {dtype} would take more than {most:,} bytes, "
            f"{UNPACKED} times the file and {SMALL:,}; save it with numpy.savez"
        )
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)
