"""Routing traces become recordings; a bad one is refused by name."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import LayoutError, Recording, StatisticError
from drlora_core.recording import from_routing_trace, load_trace


def test_a_routing_trace_becomes_phi(tmp_path: Path) -> None:
    sums = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    recording = from_routing_trace(sums, np.array([2, 4]))
    assert recording.layers == {"layers.0": 4, "layers.1": 4, "layers.2": 4}
    np.testing.assert_array_equal(recording.layer("layers.2").routing, sums[:, 2] / [[2.0], [4.0]])
    assert (recording.importance == 1.0).all()
    np.savez(tmp_path / "trace.npz", weight_sum=sums, tokens=np.array([2, 4]))
    sampled = [load_trace(tmp_path / "trace.npz", importance="sampled", seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(sampled[0].importance, sampled[1].importance)
    assert (sampled[0].importance != sampled[2].importance).all()
    assert (sampled[0].importance > 0).all()


@pytest.mark.parametrize(
    ("sums", "tokens", "error", "message"),
    [
        (np.ones((2, 3)), [1, 1], LayoutError, "accepted: .steps, layers, experts"),
        (np.ones((2, 3, 4)), [1], LayoutError, "one for each step"),
        (np.ones((2, 3, 4)), [1.0, 2.0], LayoutError, "whole numbers"),
        (np.ones((2, 3, 4)), [1, 0], StatisticError, "step 2: tokens are 0"),
        (
            np.full((2, 3, 4), np.nan),
            [1, 2],
            StatisticError,
            "'layers.0', step 1: routing.0. is nan",
        ),
    ],
)
def test_a_bad_trace_is_refused(sums: Any, tokens: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        from_routing_trace(sums, tokens)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(LayoutError, match="not a routing trace"):
        load_trace(tmp_path / "no.npz")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(LayoutError, match="weight_sum"):
        load_trace(tmp_path / "other.npz")
    np.savez(tmp_path / "pickle.npz", weight_sum=np.array([{}], dtype=object), tokens=np.ones(1))
    with pytest.raises(LayoutError, match="not a routing trace"):
        load_trace(tmp_path / "pickle.npz")
    with pytest.raises(OSError, match=r"missing\.npz"):
        load_trace(tmp_path / "missing.npz")
    with pytest.raises(LayoutError, match="accepted: 'ones' or 'sampled'"):
        from_routing_trace(np.ones((1, 1, 1)), np.ones(1, dtype=int), importance="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["U3", "S3", "complex128", "M8[s]", "m8[s]", "f8,f8", "O"])
def test_an_array_of_other_things_than_numbers_is_refused(kind: str, tmp_path: Path) -> None:
    sums = np.ones((2, 3, 4)).astype(kind) if kind != "f8,f8" else np.zeros((2, 3, 4), kind)
    np.savez(tmp_path / "trace.npz", weight_sum=sums, tokens=np.array([2, 4]))
    with pytest.raises(LayoutError, match=r"weight_sum holds .*; accepted: numbers"):
        load_trace(tmp_path / "trace.npz")
    if kind != "O":
        with pytest.raises(StatisticError, match="weight_sum is not an array of numbers"):
            from_routing_trace(sums, np.array([2, 4]))
        with pytest.raises(StatisticError, match="'a': routing is not an array of numbers"):
            Recording.from_arrays({"a": sums[0]})


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    sums = np.zeros((10, 1000, 1000), np.float32)
    np.savez_compressed(tmp_path / "bomb.npz", weight_sum=sums, tokens=np.ones(10, int))
    tracemalloc.start()
    with pytest.raises(LayoutError, match=r"shape \(10, 1000, 1000\), whose float32 would take"):
        load_trace(tmp_path / "bomb.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(4, 1000, 10**9), (-1, 3, 4)])
def test_a_shape_that_the_file_does_not_hold_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        for name, claimed in (("weight_sum", shape), ("tokens", (4,))):
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "<f8", "fortran_order": False, "shape": claimed}
                np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
                file.write(bytes(64))
    with pytest.raises(LayoutError, match="would take more than"):
        load_trace(tmp_path / "claim.npz")


def test_a_compressed_trace_is_read(tmp_path: Path) -> None:
    """Of 4 of 64 experts that are ever selected."""
    sums = np.zeros((500, 8, 64))
    sums[:, :, :4] = np.random.default_rng(0).random((500, 8, 4))
    np.savez_compressed(tmp_path / "trace.npz", weight_sum=sums, tokens=np.full(500, 9))
    assert load_trace(tmp_path / "trace.npz").steps == 500
