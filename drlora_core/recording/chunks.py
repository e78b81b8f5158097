"""Writing chunks and metadata of a Zarr v3 array, synchronously and atomically.

The zarr library writes through an event loop and thread pools, which no longer exist when an
interpreter ends, and takes a few milliseconds per call. A recording appends whole chunks of known
arrays only, so this file writes them itself; the library creates the store and reads it.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COMPRESSION = {"cname": "zstd", "clevel": 3}


def codecs(dtype: type) -> list[Any]:
    """Compressors of an array, as the zarr library names them; `_encoded` does the same."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    size = np.dtype(dtype).itemsize
    return [BloscCodec(typesize=size, shuffle="shuffle", **_COMPRESSION), Crc32cCodec()]


def _encoded(chunk: NDArray[Any]) -> bytes:
    """Encode a whole chunk: little-endian bytes, shuffled and compressed, then a checksum."""
    import google_crc32c
    from numcodecs import Blosc  # type: ignore[import-untyped, unused-ignore]

    plain = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("<"))
    packed = bytes(Blosc(shuffle=Blosc.SHUFFLE, **_COMPRESSION).encode(plain))
    return packed + struct.pack("<I", google_crc32c.value(packed))


def write(array: Path, index: int, chunk: NDArray[Any]) -> None:
    """Write chunk ``index`` along the first dimension; the other dimensions have one chunk."""
    key = [str(index), *("0" for _ in chunk.shape[1:])]
    _replace(array.joinpath("c", *key), _encoded(chunk))


def set_length(array: Path, length: int) -> None:
    """Change the size of the first dimension; chunks stay as they are."""
    metadata = json.loads((array / "zarr.json").read_text())
    metadata["shape"][0] = length
    _replace(array / "zarr.json", json.dumps(metadata).encode())


def set_attribute(group: Path, name: str, value: Any) -> None:
    """Change an attribute of a group."""
    metadata = json.loads((group / "zarr.json").read_text())
    metadata["attributes"][name] = value
    _replace(group / "zarr.json", json.dumps(metadata).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)
