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


class Choices(random.Random):
    """Draws what given bytes say: bytes that differ little make damage that differs little."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._left = data

    def getrandbits(self, k: int) -> int:
        size = -(-k // 8)
        taken, self._left = self._left[:size], self._left[size:]
        return int.from_bytes(taken, "little") & ((1 << k) - 1)  # 0 when all are used up

    def random(self) -> float:
        return self.getrandbits(16) / 2**16


def main(name: str = "run", runs: str = "10000") -> None:
    """Let atheris choose the damage; it ends with a traceback at the first finding."""
    target, folder = ALL[name], Path(tempfile.mkdtemp())
    good = folder / "good"
    good.mkdir()
    target.write(good)

    def test(data: bytes) -> None:
        one_run(target, good, folder / "damaged", Choices(data))

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=256"], test)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
