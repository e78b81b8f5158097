"""What the scripts of the page read: Plotly and the figures, compressed, as text.

Base64 has no character that HTML or a script could read as its own, whatever a layer is called.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.resources
import json
from collections.abc import Iterable

from drlora_core.report.figures import Card

FILES = importlib.resources.files("drlora_core") / "templates"


def read_template(name: str) -> str:
    """Read a file of the templates."""
    text: str = (FILES / name).read_text(encoding="utf-8")
    return text


def pack(text: str) -> str:
    """Compress a text with gzip; the same text always gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def unpack(packed: str) -> str:
    """Undo `pack`.

    Example:
        >>> unpack(pack("a layer"))
        'a layer'
    """
    return gzip.decompress(base64.b64decode(packed)).decode()


def plotly_source() -> str:
    """Return the script of Plotly that is shipped: the traces of this package's figures alone."""
    return read_template("plotly/plotly-cartesian.min.js")


@functools.cache
def packed_plotly() -> str:
    """Return the script of Plotly, compressed."""
    return pack(plotly_source())


def pack_figures(cards: Iterable[Card]) -> str:
    """Compress the figures of cards: a list of names and figures by the key of the card."""
    parts = []
    for card in cards:
        variants = []
        for name, figure in card.variants.items():
            figure.update_layout(template={}, title=None)  # the page has its own of both
            variants.append(f'{{"name": {json.dumps(name)}, "figure": {figure.to_json()}}}')
        parts.append(f"{json.dumps(card.key)}: [{', '.join(variants)}]")
    return pack(f"{{{', '.join(parts)}}}")


def script_hash(source: str) -> str:
    """Return the hash of a script as a Content-Security-Policy names it."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
