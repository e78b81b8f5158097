"""Experts that cannot be adapted: listed by name, so that no model is half adapted in silence.

Each class is refused for a reason of its own. A ``ModuleList`` or ``ModuleDict`` called ``experts``
in a block that nobody declared is refused because what its block does with it cannot be guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.convention import Observer
from drlora_torch.models.fused import is_of_class
from drlora_torch.models.location import Location

DEQUANTISE = (
    "its experts are quantised ({kind}) and multiplied by kernels that cannot add a LoRA; load the "
    "model in a floating-point dtype: from_pretrained(..., quantization_config={config}"
    "(dequantize=True))"
)
REASONS = {
    "transformers.models.doge.modeling_doge.DogeCDMoE": (
        "an expert is one row of an embedding, retrieved by its index: a matrix of rank 1 has no "
        "low-rank update"
    ),
    "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseNaiveMoe": (
        "the caller chooses one expert per image (dataset_index): there is no router and no "
        "routing weight to allocate ranks by"
    ),
    "transformers.integrations.mxfp4.Mxfp4GptOssExperts": DEQUANTISE.format(
        kind="mxfp4", config="Mxfp4Config"
    ),
    "transformers.integrations.finegrained_fp8.FP8Experts": DEQUANTISE.format(
        kind="fp8", config="FineGrainedFP8Config"
    ),
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Llama4TextExperts": (
        "its experts are quantised (fp8) and multiplied by kernels that cannot add a LoRA; load "
        "the model in a floating-point dtype, without quantization_config"
    ),
}
UNDECLARED = (
    "its experts are modules of a block, {block}, that drlora does not know; declare the class "
    "with drlora_torch.register_moe (see docs/adding_a_model.md)"
)


class Refused:
    """The convention of the classes above; adapts nothing."""

    name = "none"

    def matches(self, module: nn.Module) -> bool:
        return is_of_class(module, tuple(REASONS))

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def first_weight(self, module: Any) -> Tensor | None:
        return next(iter(module.parameters()), None)

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        return {}

    def router_child(self, module: Any) -> str | None:
        return None

    def only_on_request(self, module: Any) -> bool:
        return False

    def obstacle(self, module: Any) -> str | None:
        return next(reason for name, reason in REASONS.items() if is_of_class(module, (name,)))

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        self._refuse()

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        self._refuse()

    def location(self, module: Any, projection: str) -> Location:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError("a layer with an obstacle is not adapted")


def is_undeclared(name: str, module: nn.Module) -> bool:
    """True for a container of modules called ``experts``; ask only where no layer was found."""
    container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return container and name.rpartition(".")[2] == "experts" and len(module) > 1  # type: ignore[arg-type]
