"""What the table found: bugs of combinations that no single row names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from drlora_torch.step.forwards import ModelCall
from tests.torch import helpers
from tests.torch.conformance import tiny


def test_routing_weights_of_another_dtype_than_the_experts() -> None:
    """Routers that compute in float32 whatever the model's dtype, and learn."""
    model = tiny.build("gpt_oss").double()
    model.set_experts_implementation("eager")
    helpers.uneven(helpers.attach(model))
    experts = model.model.layers[0].mlp.experts
    weights = torch.rand(5, 2, requires_grad=True)
    rows, index = torch.randn(5, 32, dtype=torch.float64), torch.arange(10).view(5, 2) % 8
    experts(rows, index, weights).sum().backward()
    same = weights.detach().double().requires_grad_(True)
    experts(rows, index, same).sum().backward()
    assert weights.grad.dtype == torch.float32
    torch.testing.assert_close(weights.grad.double(), same.grad, rtol=1e-6, atol=1e-6)


def test_masks_of_layers_that_receive_some_of_the_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    kinds = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]])
    forward = ModelCall(mask=mask, length=4, kinds=kinds)

    def counted(call: ModelCall, num_tokens: int) -> list[bool] | None:
        """Which tokens count; None where the mask cannot be aligned, and so all of them do."""
        found = call.token_mask(num_tokens)
        if found is None:
            return None
        mask, aligned = found
        assert aligned is None or aligned or mask.tolist() == [True] * num_tokens
        return mask.tolist() if aligned is None or aligned else None

    assert counted(forward, 8) == [True] * 6 + [False] * 2
    assert counted(forward, 6) == [True] * 4 + [False] * 2
    assert counted(forward, 2) == [True, True]
    assert counted(forward, 4) is None  # another tower
    assert counted(forward, 9) is None
    assert counted(ModelCall(mask=mask, length=4), 6) is None
    halves = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])  # cannot be told apart
    assert counted(ModelCall(mask=mask, length=4, kinds=halves), 4) is None


class Beholder(nn.Module):
    """A model that reads text and looks at images, with experts in its vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tiny.build("dots3_note_vision")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, grid_thw: Tensor
    ) -> Tensor:
        return self.tower(pixel_values=pixel_values, grid_thw=grid_thw).last_hidden_state


def test_the_mask_of_the_text_is_not_that_of_the_patches() -> None:
    """Even where there are as many of the one as of the other."""
    model = Beholder().train()
    adapter = helpers.attach(model)
    optimizer, spy, received = helpers.adamw(adapter), helpers.Spy(adapter), tiny.Received(adapter)
    arguments = tiny.inputs("dots3_note_vision")
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[:, 5:] = 0
    model(input_ids=mask, attention_mask=mask, **arguments).mean().backward()
    optimizer.step()
    for layer, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 24
        np.testing.assert_allclose(phi, received.phi(layer, [True] * 24), rtol=1e-6)
