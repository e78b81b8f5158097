"""Fuzz one reader, guided by the code that it reaches: `python -m scripts.fuzz.guided TARGET`.

Needs atheris, which is no dependency of drlora: `pip install atheris`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["drlora_core", "drlora_torch"]):
    from scripts.fuzz.attempts import ALL, one_run


def main(name: str = "run", runs: str = "10000") -> None:
    """Let atheris choose the damage; it ends with a traceback at the first finding."""
    target, folder = ALL[name], Path(tempfile.mkdtemp())
    good = folder / "good"
    good.mkdir()
    target.write(good)

    def test(data: bytes) -> None:
        one_run(target, good, folder / "damaged", random.Random(data))

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=64"], test)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
