"""What the scripts of the page read: Plotly and the figures, compressed, as text.

Base64 has no character that HTML or a script could read as its own, whatever a layer is called.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.resources
from collections.abc import Iterable
from typing import Any

from drlora_core.errors import import_extra
from drlora_core.report.figures import Card

FILES = importlib.resources.files("drlora_core") / "templates"


def read_template(name: str) -> str:
    """Read a file of the templates."""
    text: str = (FILES / name).read_text(encoding="utf-8")
    return text


def pack(text: str) -> str:
    """Compress a text with gzip; the same text always gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def plotly_source() -> str:
    """Return the script of Plotly that is shipped: the traces of this package's figures alone."""
    return read_template("plotly/plotly-cartesian.min.js")


@functools.cache
def packed_plotly() -> str:
    """Return the script of Plotly, compressed."""
    return pack(plotly_source())


def pack_figures(cards: Iterable[Card]) -> str:
    """Compress the figures of cards: a list of names and figures by the key of the card."""
    found = {
        card.key: [
            {"name": name, "figure": _plain(figure)} for name, figure in card.variants.items()
        ]
        for card in cards
    }
    return pack(import_extra("plotly.io.json", "report").to_json_plotly(found))


def _plain(figure: Any) -> dict[str, Any]:
    """Traces and layout of a figure, without template and title: the page has its own of both."""
    content = figure.to_plotly_json()
    layout = {k: v for k, v in content["layout"].items() if k not in ("template", "title")}
    return {"data": content["data"], "layout": layout}


def script_hash(source: str) -> str:
    """Return the hash of a script as a Content-Security-Policy names it."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
