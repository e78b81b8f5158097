"""Declared blocks without rank: whatever they are given and return, they are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from drlora_torch.models import declaration
from tests.torch import helpers, models
from tests.torch.conventions import handwritten
from tests.torch.conventions.handwritten import Block, Model
from tests.torch.conventions.test_register import loss_of


@pytest.fixture(autouse=True)
def _declared() -> Iterator[None]:
    before = dict(declaration._DECLARED)
    handwritten.register()
    yield
    declaration._DECLARED.clear()
    declaration._DECLARED.update(before)


class KeywordBlock(Block):
    """Its hidden states come by keyword, behind what is no tensor or no number."""

    def forward(  # type: ignore[override]
        self, positions: Tensor, mask: None = None, *, hidden: Tensor
    ) -> Tensor:
        """[B, L, H] in and out."""
        return super().forward(hidden)


class Named(NamedTuple):
    """What some blocks return."""

    number: int
    hidden: Tensor


RETURNS: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda hidden: hidden, lambda output: output),
    "tuple": (lambda hidden: (hidden, 1), lambda output: output[0]),
    "named tuple": (lambda hidden: Named(1, hidden), lambda output: output.hidden),
    "list": (lambda hidden: [hidden, 1], lambda output: output[0]),
    "dict": (lambda hidden: {"n": 1, "hidden": hidden}, lambda output: output["hidden"]),
    "model output": (
        lambda hidden: BaseModelOutput(last_hidden_state=hidden),
        lambda output: output.last_hidden_state,
    ),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_blocks_without_rank_count_whatever_they_are_given_and_return(kind: str) -> None:
    """And their caller may change what they return in place."""
    made, taken = RETURNS[kind]

    class Returning(KeywordBlock):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return made(super().forward(*args, **kwargs))

    class Calling(Model):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            hidden = self.embed(ids)
            for block in self.blocks:
                found = taken(block(positions=ids, mask=None, hidden=hidden))
                hidden = found.add_(hidden)
            logits: Tensor = self.head(hidden)
            return logits

    model = Calling(Returning)
    before = model(models.tokens())
    adapter = helpers.attach(model, config={"r_init": 0})
    spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter)
    assert torch.equal(model(models.tokens()), before)
    for seed in range(4):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(sample.keys() == adapter.layers.keys() for sample in spy.samples)
    assert all(ranks.sum() == 16 for ranks in adapter.ranks().values())
