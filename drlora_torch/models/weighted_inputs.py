"""Experts whose inputs are multiplied by the routing weights, densely, for every expert.

The block repeats its tokens to [N * T, H], expert by expert, times a weight that is exactly 0
where the expert was not chosen; ``experts(inputs)`` is the whole call, and an expert of zeros
gives zeros. So only the chosen rows are computed here; outputs and gradients are the same.
The layer is the block, which holds the router too: nothing else knows the routing.

Shape letters: T tokens, K experts per token, N experts, H model width, S = T * K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from drlora_torch.dispatch import Dispatch
from drlora_torch.errors import ModelError
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.convention import Observer
from drlora_torch.models.fused import (
    FusedConvention,
    all_of,
    compute_dtype,
    give_lora,
    run_instead,
)
from drlora_torch.models.storage import ExpertParameter


class WeightedInputs(FusedConvention):
    """Llama 4."""

    NAME = "weighted inputs"
    CLASSES = ("transformers.models.llama4.modeling_llama4.Llama4TextMoe",)
    TRANSPOSED = {"gate_up_proj": True, "down_proj": True}  # noqa: RUF012

    def parameter(self, module: Any, projection: str) -> Any:
        """The weights are in the child ``experts``."""
        return getattr(module.experts, projection, None)

    def storage(self, module: Any, projection: str) -> ExpertParameter:
        """A parameter of that child."""
        transposed = self.TRANSPOSED[projection]
        return ExpertParameter(module="experts", name=projection, transposed=transposed)

    def router_child(self, module: Any) -> str | None:
        """The block holds its router."""
        return "router"

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        """Give the block its LoRA, its experts a forward, its router a hook."""
        chosen: list[Tensor] = []  # index [T, K] of the router's last call

        def routed(router: Any, args: object, output: tuple[Tensor, Tensor]) -> None:
            scores, logits = output
            index = logits.topk(router.top_k, dim=1).indices  # as the router itself chose
            chosen[:] = [index]
            if observer.enabled:
                observer.routed(lora.name, index, scores.detach().gather(1, index))

        def forward(hidden_states: Tensor) -> Tensor:
            if not chosen:
                raise ModelError(f"{lora.name}: its experts were called without their router")
            return self._run(module, lora, hidden_states, chosen.pop())

        return all_of(
            [
                give_lora(module, lora, observer),
                run_instead(module.experts, forward, observer),
                module.router.register_forward_hook(routed).remove,
            ]
        )

    def _run(self, module: Any, lora: ExpertLoRA, inputs: Tensor, index: Tensor) -> Tensor:
        """Experts with LoRA on weighted inputs [N * T, H]; rows not chosen stay 0."""
        dtype = compute_dtype(module.experts.gate_up_proj)
        dispatch = Dispatch.sort(index, lora.table.num_experts)
        chosen = index.reshape(-1)[dispatch.order] * index.shape[0] + dispatch.tokens  # [S]
        rows = inputs[chosen].to(dtype)
        rows = self.project(module, "gate_up_proj", lora, rows, dispatch)
        gate, up = rows.chunk(2, dim=-1)
        rows = (up * module.experts.act_fn(gate)).to(dtype)
        rows = self.project(module, "down_proj", lora, rows, dispatch)
        output = inputs.new_zeros(inputs.shape[0], rows.shape[1])
        return output.index_copy(0, chosen, rows.to(inputs.dtype))
