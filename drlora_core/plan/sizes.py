"""Parameters and memory of LoRA on fused experts, for our two layouts and for others'.

A rank slot of a projection has a row of A [in] and a column of B [out]; a slot of an expert has one
of each of its projections.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from drlora_core.config import AllocatorConfig
from drlora_core.plan.model_shape import ModelShape

DType = Literal["float32", "bfloat16", "float16"]
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """What one way of storing the LoRA takes, over all MoE layers."""

    name: str
    rank: int
    """Slots per expert, on average over a layer."""
    parameters: int
    weights: int
    """Bytes, as are the following."""
    gradients: int
    adam: int
    """Both moments of Adam; in PyTorch they have the dtype of the parameter."""

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and Adam."""
        return self.weights + self.gradients + self.adam


def slot_parameters(shape: ModelShape) -> int:
    """LoRA parameters of one rank of one expert: the sum of in + out of its projections."""
    return sum(inner + outer for inner, outer in shape.projections().values())


def storage(name: str, shape: ModelShape, rank: int, dtype: DType) -> Storage:
    """Storage of ``rank`` slots per expert in every MoE layer."""
    parameters = shape.num_experts * rank * slot_parameters(shape)
    size = parameters * BYTES[dtype]
    return Storage(name, rank, parameters, weights=size, gradients=size, adam=2 * size)


def storages(shape: ModelShape, config: AllocatorConfig, dtype: DType) -> list[Storage]:
    """All that `plan` compares: our layouts, uniform LoRA, PEFT; then active ranks.

    PEFT's ``target_parameters`` stores A [N * r, in] and B [out, N * r], one r for all experts; an
    expert may only reach r_max there if all have it.
    """
    return [
        storage("drlora, layout pooled", shape, config.mean_rank_ceiling, dtype),
        storage("drlora, layout masked", shape, config.r_max, dtype),
        storage("uniform LoRA at r_target", shape, config.r_target, dtype),
        storage("PEFT target_parameters at r_target", shape, config.r_target, dtype),
        storage("PEFT target_parameters at r_max", shape, config.r_max, dtype),
        storage("active at the start", shape, config.starting_rank, dtype),
        storage("active when the budget is met", shape, config.r_target, dtype),
        storage("if every expert had r_max", shape, config.r_max, dtype),
    ]


def peft_transient(shape: ModelShape, dtype: DType) -> int:
    """Bytes of the update B A of every expert of one layer, which PEFT builds at each forward."""
    largest = max(shape.experts.values())
    return BYTES[dtype] * largest * sum(i * o for i, o in shape.projections().values())
