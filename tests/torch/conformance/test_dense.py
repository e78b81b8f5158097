"""LoRA of attention and the other dense Linears, over the table: one step, and a merge."""

from __future__ import annotations

import re

import pytest
import torch

from tests.torch import helpers
from tests.torch.conformance import tiny
from tests.torch.conformance.test_table import ROUNDING, distance, thinned
from tests.torch.dense import fill, linears

pytestmark = pytest.mark.slow
IDLE = {
    "deepseek_v4": ".compressor.",  # it waits for more tokens than the rows have
    "dots3_note_vision": "merger.",  # it comes after the hidden states that the loss reads
    "zaya": r"qkv_proj\.[qk]_proj",  # scaled by temperatures that are 0 at the start
}
"""The Linears that the tiny model's first step cannot move, by a pattern. No family is left out."""


@thinned
def test_dense_linears_learn_and_merge(name: str) -> None:
    model = tiny.build(name, exact=True)
    with tiny.Float64Throughout():
        adapter = helpers.attach(model, attention_rank=2)
        optimizer = helpers.adamw(adapter)
        tiny.step(model, name, optimizer)
        for linear, each in linears(adapter).items():
            idle = name in IDLE and re.search(IDLE[name], linear) is not None
            assert bool(each.lora.lora_B.any()) is not idle, linear
        fill(adapter)
        with torch.no_grad():
            before = tiny.output(model.eval(), tiny.inputs(name))
            with adapter.disabled():
                base = tiny.output(model, tiny.inputs(name))
            adapter.merge()
            after = tiny.output(model, tiny.inputs(name))
    assert distance(base, before) > 1e-3
    assert distance(after, before) < ROUNDING
