"""Blocks with experts of Linears, declared by :func:`drlora_torch.register_moe` or as a family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from drlora_torch.errors import ModelError
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.block_hooks import BlockHooks
from drlora_torch.models.convention import (
    ON_META,
    Observer,
    Undo,
    dtype_name,
    give_lora,
    quantized,
    undo_all,
)
from drlora_torch.models.location import ExpertLinears
from drlora_torch.quantized.four_bit import load_bitsandbytes

Routing = Callable[..., tuple[Tensor, Tensor]]
"""The routing (index, weights), both [T, K], as :func:`register_moe` describes it."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PerExpertLinears:
    """The convention of one declared class; the arguments are those of :func:`register_moe`."""

    experts: str | Callable[[Any], Sequence[nn.Module]]
    projections: tuple[str, ...]
    router: str | None
    routing: Routing
    name = "per-expert Linears"
    only_on_request = False

    def container(self, module: nn.Module) -> list[nn.Module]:
        """Experts of a block in the order of their indices."""
        if not isinstance(self.experts, str):
            return list(self.experts(module))
        container = module.get_submodule(self.experts)
        if isinstance(container, nn.ModuleDict):
            return list(container.values())
        return list(container) if isinstance(container, nn.ModuleList) else []

    def linears(self, module: nn.Module) -> dict[str, list[Any]]:
        experts = self.container(module)
        return {name: [each.get_submodule(name) for each in experts] for name in self.projections}

    def num_experts(self, module: Any) -> int:
        try:
            return len(self.container(module))
        except AttributeError:
            return 0

    def first_weight(self, module: Any) -> Tensor | None:
        if self.obstacle(module, on_meta=True) is not None:
            return None
        weight: Tensor = self.linears(module)[self.projections[0]][0].weight
        return weight

    def storage(self, module: Any) -> tuple[str, int]:
        if self.obstacle(module, on_meta=True) is not None:
            return "unknown", 0
        weights = [each.weight for linears in self.linears(module).values() for each in linears]
        state = getattr(weights[0], "quant_state", None)  # of bitsandbytes, in 4 bits
        kind = dtype_name(weights[0]) if state is None else str(state.quant_type)
        return kind, sum(weight.nbytes for weight in weights)

    def is_packed(self, module: Any) -> bool:
        return any(_is_4bit(each) for linears in self.linears(module).values() for each in linears)

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        return {name: _shape(each[0]) for name, each in self.linears(module).items()}

    def obstacle(self, module: Any, *, on_meta: bool = False) -> str | None:
        try:
            if not self.container(module):
                return f"{self.experts!r} is not a ModuleList or ModuleDict with experts"
            if self.router is not None:
                module.get_submodule(self.router)
            linears = self.linears(module)
        except AttributeError as error:
            return f"it is not as register_moe was told: {error}"
        for name, each in linears.items():
            for expert, linear in enumerate(each):
                if (reason := _linear_obstacle(linear, each[0], on_meta)) is not None:
                    return f"{name} of expert {expert} {reason}"
        return None

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        linear: Any = self.container(module)[expert].get_submodule(projection)
        weight: Tensor = linear.weight
        if _is_4bit(linear):
            state = linear.weight.quant_state
            unpacked: Tensor = load_bitsandbytes().dequantize_4bit(weight.data, state)
            return unpacked
        if (reason := quantized(weight)) is not None:
            raise ModelError(f"{projection} of expert {expert} {reason} to merge the adapter")
        return weight

    def location(self, module: Any, projection: str) -> ExpertLinears:
        names = {id(child): name for name, child in module.named_modules()}
        found = tuple(names.get(id(each), "") for each in self.container(module))
        if "" in found or len(set(found)) < len(found):
            raise ModelError(
                f"the experts of {type(module).__name__} are not modules of the block with a name "
                "for each, so nothing can be written under their names"
            )
        return ExpertLinears(experts=found, projection=projection)

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
        hooks = BlockHooks(self.router, self.routing, lora, observer)
        handles = hooks.register(module, self.linears(module))
        return undo_all(give_lora(module, lora, observer), *(each.remove for each in handles))


def _is_4bit(linear: Any) -> bool:
    """True for a Linear of bitsandbytes."""
    return getattr(linear.weight, "quant_state", None) is not None


def _shape(linear: Any) -> ProjectionShape:
    return ProjectionShape(linear.in_features, linear.out_features)


def _linear_obstacle(linear: nn.Module, first: nn.Module, on_meta: bool) -> str | None:
    if not isinstance(linear, nn.Linear):
        return f"is a {type(linear).__name__}, not a Linear"
    if linear.weight.is_meta and not on_meta:
        return ON_META
    if _shape(linear) != _shape(first):
        return "has other features than that of expert 0"
    if linear.weight.device != first.weight.device:
        return "is on another device than that of expert 0"
    return None
