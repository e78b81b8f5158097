"""Parts of models that an adapter refuses, or looks at in an unusual way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from drlora_core.errors import StatisticError, UnknownLayerError
from drlora_torch import signals
from drlora_torch.errors import AttachError
from drlora_torch.lifecycle import dense_choice
from tests.torch import helpers, models


def test_linears_on_the_meta_device_are_refused() -> None:
    model = models.build()
    model.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(AttachError, match=r"q_proj' is on the meta device; load the weights first"):
        helpers.attach(model, attention_rank=2)


def test_a_linear_inside_of_pefts_is_refused() -> None:
    with pytest.raises(AttachError, match=r"PEFT adapts 'q_proj' already; leave it to one"):
        dense_choice._check("q_proj.base_layer", nn.Linear(2, 2))


class WithHead(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.scores, self._answer = nn.Linear(2, 2), answer

    def get_output_embeddings(self) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self.scores if self._answer else None


@pytest.mark.parametrize(("answer", "heads"), [(True, 1), (None, 0), (NotImplementedError(), 0)])
def test_the_head_that_a_model_names_is_one(answer: Any, heads: int) -> None:
    assert len(list(dense_choice._heads(WithHead(answer)))) == heads


def test_attention_of_torch_is_left_out() -> None:
    attention = nn.MultiheadAttention(4, 2)
    why = dense_choice._unlike_linear(attention.out_proj)
    assert why == "torch's MultiheadAttention reads its weight without calling it"


def test_targets_that_a_layer_lacks_are_named() -> None:
    with pytest.raises(UnknownLayerError, match="no projection 'dwn_proj'; did you mean"):
        helpers.attach(models.build(), targets=["dwn_proj"])


def test_a_signal_whose_code_is_not_here_is_named() -> None:
    with pytest.raises(StatisticError, match="importance signal 'mine' is not here: its code"):
        signals._answer("importance", "mine", None, None, torch.zeros(1))

    def other(given: Any) -> Any:
        raise StatisticError("its own reason")

    with pytest.raises(StatisticError, match="its own reason"):
        signals._answer("importance", "mine", other, None, torch.zeros(1))
