"""The endurance run of scripts/soak.py, over few steps."""

from __future__ import annotations

import pytest

from scripts import soak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_few_steps_are_measured() -> None:
    blocks = soak.train(40)
    assert len(blocks) == soak.BLOCKS
    assert len({block.handles for block in blocks}) == 1
    assert blocks[3].tensors == blocks[-1].tensors


def test_what_grows_is_named() -> None:
    flat = [soak.Block(10.0, 500.0, 6, 80)] * soak.BLOCKS
    assert soak.grown(flat) == []
    for late in (
        soak.Block(13.0, 500.0, 6, 80),
        soak.Block(10.0, 520.0, 6, 80),
        soak.Block(10.0, 500.0, 7, 80),
        soak.Block(10.0, 500.0, 6, 90),
    ):
        assert len(soak.grown([*flat[:-1], late])) == 1
