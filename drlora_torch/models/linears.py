"""Blocks with experts of Linears, declared by :func:`drlora_torch.register_moe` or as a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from drlora_torch.errors import ModelError
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models import block_hooks
from drlora_torch.models.convention import Observer
from drlora_torch.models.declaration import Declaration, declaration_of
from drlora_torch.models.location import ExpertLinears


class PerExpertLinears:
    """The convention of every declared class.

    Args:
        families: declarations of known families; users add theirs by ``register_moe``.
    """

    name = "per-expert Linears"

    def __init__(self, *families: Declaration) -> None:
        self._known = {declaration.block_name: declaration for declaration in families}

    def matches(self, module: nn.Module) -> bool:
        return declaration_of(module, self._known) is not None

    def num_experts(self, module: Any) -> int:
        try:
            return len(self._of(module).container(module))
        except AttributeError:
            return 0

    def first_weight(self, module: Any) -> Tensor | None:
        if self.obstacle(module) is not None:
            return None
        declaration = self._of(module)
        weight: Tensor = declaration.linears(module, declaration.projections[0])[0].weight  # type: ignore[assignment]
        return weight

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        declaration = self._of(module)
        return {
            name: _shape(declaration.linears(module, name)[0]) for name in declaration.projections
        }

    def router_child(self, module: Any) -> str | None:
        return self._of(module).router

    def only_on_request(self, module: Any) -> bool:
        return False

    def obstacle(self, module: Any) -> str | None:
        declaration = self._of(module)
        try:
            if len(declaration.container(module)) == 0:
                return f"{declaration.experts!r} is not a ModuleList or ModuleDict with experts"
            if declaration.router is not None:
                module.get_submodule(declaration.router)
            linears = {n: declaration.linears(module, n) for n in declaration.projections}
        except AttributeError as error:
            return f"it is not as register_moe was told: {error}"
        for name, each in linears.items():
            for expert, linear in enumerate(each):
                if (reason := _linear_obstacle(linear, each[0])) is not None:
                    return f"{name} of expert {expert} {reason}"
        return None

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        weight: Tensor = self._of(module).linears(module, projection)[expert].weight  # type: ignore[assignment]
        if not weight.is_floating_point() or weight.element_size() == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"{projection} of expert {expert} is quantised ({kind}): nothing can be merged "
                "into it; keep the adapter, or load the model in a floating-point dtype"
            )
        return weight

    def location(self, module: Any, projection: str) -> ExpertLinears:
        names = {id(child): name for name, child in module.named_modules()}
        experts = self._of(module).container(module)
        found = tuple(names.get(id(expert), "") for expert in experts)
        if "" in found or len(set(found)) < len(found):
            raise ModelError(
                f"the experts of {type(module).__name__} are not modules of the block with a name "
                "for each, so nothing can be written under their names"
            )
        return ExpertLinears(experts=found, projection=projection)

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        return block_hooks.install(self._of(module), module, lora, observer)

    def _of(self, module: nn.Module) -> Declaration:
        declaration = declaration_of(module, self._known)
        assert declaration is not None
        return declaration


def _shape(linear: Any) -> ProjectionShape:
    return ProjectionShape(linear.in_features, linear.out_features)


def _linear_obstacle(linear: nn.Module, first: nn.Module) -> str | None:
    if not isinstance(linear, nn.Linear):
        return f"is a {type(linear).__name__}, not a Linear"
    if linear.weight.is_meta:
        return (
            "is on the meta device; load the weights first, without offloading them (to CPU or "
            "disk)"
        )
    if _shape(linear) != _shape(first):
        return "has other features than that of expert 0"
    if linear.weight.device != first.weight.device:
        return "is on another device than that of expert 0"
    return None
