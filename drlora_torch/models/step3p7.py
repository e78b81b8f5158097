"""Step 3.7: experts as the experts interface has them, whose class does not take part in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.models.fused import GATE_UP_DOWN, Fused, Project, is_a, packed_routed, routed


def _run(module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    rows = module._apply_gate(project("gate_up_proj", tokens, gather=True))
    return project("down_proj", rows, routing_weights=weights)


STEP3P7: Fused = Fused(
    name="undecorated",
    matches=is_a("transformers.models.step3p7.modeling_step3p7.Step3p7Experts"),
    weights=lambda module: GATE_UP_DOWN,
    install_into=routed(_run),
    packed=packed_routed(lambda: STEP3P7, _run),
)
