"""Damage files at random: bytes, and values of JSON, also in safetensors and NumPy zips."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**4, 2**31, 2**63, 10**15, 10**400, 0.5, -0.0, 1e30, 1e308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "NaN",
        "0",
        "../../x",
        "<b>",
        "\x1b[31m",
        "a" * 999,
    ),
    *("\ud800", "\x00", "~nobody/x", "9" * 5000),
    *([], {}, [[]], [None], {"": {}}, [0] * 999, {"r": -5}, "(a+)+$", "(" * 99),
]
DEEP = "a value that is nested deeply"
BYTES = (b"\x00", b"\xff", b"NaN", b"1e999", b"-1", b"[" * 2000, b"{}", b'""', b"9" * 400)


def damage(content: bytes, draw: random.Random) -> bytes:
    """Change a few bytes, cut, repeat or insert some."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = draw.choice(BYTES)
            case 3:
                del data[at : at + draw.randrange(1, 64)]
            case _:
                data[at:at] = data[at : at + draw.randrange(1, 64)]
    return bytes(data)


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Put nasty values into a JSON text, or leave fields out."""
    value = copy.deepcopy(json.loads(content))
    for _ in range(draw.choice((1, 1, 2))):
        if not (places := list(_places(value))):
            return json.dumps(draw.choice(NASTY)).encode()
        holder, key = draw.choice(places)
        if draw.random() < 0.15:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice([DEEP, *NASTY]))
    depth = draw.randrange(200, 1000)  # up to what Python's own reader of JSON takes
    return json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


def damage_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Damage the header of a safetensors file or JSON in its metadata, keeping its length true."""
    size = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.get("__metadata__", {})
    inner = [name for name, text in metadata.items() if text.startswith("{")]
    if inner and draw.random() < 0.7:
        name = draw.choice(inner)
        metadata[name] = damage_json(metadata[name].encode(), draw).decode()
        made = json.dumps(header).encode()
    else:
        made = damage_json(json.dumps(header).encode(), draw)
    return len(made).to_bytes(8, "little") + made + tensors


def damage_zip(content: bytes, draw: random.Random) -> bytes:
    """Damage one member of a zip, such as an ``.npz``, with sums that are right again."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        members = {name: old.read(name) for name in old.namelist()}
    name = draw.choice(list(members))
    members[name] = damage(members[name], draw)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for member, data in members.items():
            new.writestr(member, data)
    return stream.getvalue()


def damage_lines(content: bytes, draw: random.Random) -> bytes:
    """Damage the JSON in one line of several."""
    lines = content.splitlines()
    chosen = draw.randrange(len(lines))
    lines[chosen] = damage_json(lines[chosen], draw)
    return b"\n".join(lines)


def damage_gzip(content: bytes, draw: random.Random) -> bytes:
    """Damage the lines in a gzip file, which is whole again."""
    return gzip.compress(damage_lines(gzip.decompress(content), draw), mtime=0)


def _places(value: Any) -> Any:
    """Every place of a JSON value that can be replaced: its holder and its key."""
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = enumerate(value[:20])
    for key, inside in entries:
        yield value, key
        yield from _places(inside)


def mutator(name: str) -> Callable[[bytes, random.Random], bytes]:
    """Return a function that damages a file of a name: by its bytes, or by what it holds."""
    kinds = {
        ".json": damage_json,
        ".jsonl": damage_lines,
        ".jsonl.gz": damage_gzip,
        ".safetensors": damage_safetensors,
        ".npz": damage_zip,
        ".pth": damage_zip,
        ".pt": damage_zip,
    }
    inside = next((made for end, made in kinds.items() if name.endswith(end)), damage)

    def mutate(content: bytes, draw: random.Random) -> bytes:
        return inside(content, draw) if draw.random() < 0.75 else damage(content, draw)

    return mutate
