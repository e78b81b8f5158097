"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import typer

from benchmarks.blocks import DTYPES, SHAPES

ShapeName = Literal["olmoe", "qwen3", "small"]
DtypeName = Literal["float32", "bfloat16"]


def _of(known: Iterable[str]) -> Callable[[list[str] | None], list[str] | None]:
    def check(names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in known:
                raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
        return names

    return check


Shapes = Annotated[
    list[str] | None,
    typer.Option(callback=_of(SHAPES), help=f"Of {', '.join(SHAPES)}; repeatable; default all."),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(callback=_of(DTYPES), help=f"Of {', '.join(DTYPES)}; repeatable; default all."),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, help="Interleaved rounds; default: what fits a time budget, 5 to 25."),
]
