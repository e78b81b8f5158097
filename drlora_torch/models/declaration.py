"""``register_moe``: a class of blocks with per-expert Linears, declared in a few lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from drlora_torch.errors import ModelError
from drlora_torch.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.convention import Observer
from drlora_torch.models.storage import ExpertLinears


class Routing(Protocol):
    """Tells the routing of a forward: (index, weights), [tokens, experts per token] each."""

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the block and what its router returned."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Declaration:
    """What :func:`register_moe` was told of one class."""

    block_class: type[nn.Module] | str
    """A class, or the dotted name of one that need not be imported."""
    experts: str | Callable[[Any], Sequence[nn.Module]]
    projections: tuple[str, ...]
    router: str | None
    routing: Routing

    @property
    def block_name(self) -> str:
        """Dotted name of the class."""
        return self.block_class if isinstance(self.block_class, str) else _dotted(self.block_class)

    def container(self, block: nn.Module) -> list[nn.Module]:
        """Experts of a block in the order of their indices."""
        if not isinstance(self.experts, str):
            return list(self.experts(block))
        container = block.get_submodule(self.experts)
        if isinstance(container, nn.ModuleDict):
            return list(container.values())
        return list(container) if isinstance(container, nn.ModuleList) else []

    def linears(self, block: nn.Module, projection: str) -> list[nn.Module]:
        """One projection of every expert."""
        return [expert.get_submodule(projection) for expert in self.container(block)]


_DECLARED: dict[str, Declaration] = {}


def register_moe(
    block_class: type[nn.Module],
    *,
    experts: str | Callable[[Any], Sequence[nn.Module]],
    projections: Sequence[str],
    router: str | None,
    routing: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Declare a class of MoE blocks whose experts are modules of Linears.

    Call it before ``discover``, ``attach`` and ``load``; a later call for the same class replaces
    the earlier one. Subclasses are covered. The layer then has the name of the block.

    Args:
        block_class: the class of the block: the module that holds router and experts.
        experts: name, in the block, of the ``ModuleList`` or ``ModuleDict`` of experts; the i-th
            entry is the expert of index i. Or a function of the block that lists its experts.
        projections: names of the Linears in an expert, in the order they are applied.
        router: name, in the block, of the module that is called once per forward of the block to
            decide the routing; None if the block is handed its routing.
        routing: tells the routing that the block makes of it: called with the block and what the
            router returned, it gives the indices of the chosen experts (integers [T, K]; numbers
            from N on choose nobody) and the weights that the block multiplies their outputs with
            ([T, K]). With ``router=None`` it gets the block and the arguments of its forward.

    Raises:
        ModelError: an argument of a wrong kind. What it says of the model is checked by
            ``attach``, and at every forward.

    Example:
        >>> import torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = torch.nn.Linear(8, 4)
        ...         self.experts = torch.nn.ModuleList(
        ...             torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
        ...             for _ in range(4))
        >>> register_moe(Block, experts="experts", projections=("0", "1"), router="gate",
        ...     routing=lambda block, logits: logits.softmax(-1).topk(2)[::-1])
        >>> import drlora_torch
        >>> drlora_torch.discover(Block())[0].projections["0"]
        ProjectionShape(in_features=8, out_features=6)
    """
    if not (isinstance(block_class, type) and issubclass(block_class, nn.Module)):
        raise ModelError(f"block_class must be a class of torch.nn.Module, got {block_class!r}")
    names = (projections,) if isinstance(projections, str) else tuple(projections)
    if not names or len(set(names)) < len(names) or any("." in n or not n for n in names):
        raise ModelError(
            f"projections must name different direct children of an expert, got {projections!r}"
        )
    if not (callable(experts) or (isinstance(experts, str) and experts)):
        raise ModelError(f"experts must name a child of the block, or list them, got {experts!r}")
    if router is not None and not isinstance(router, str):
        raise ModelError(f"router must be the name of a child of the block, got {router!r}")
    if not callable(routing):
        raise ModelError(f"routing must be a function, got {routing!r}")
    declare(Declaration(block_class, experts, names, router, routing))


def declare(declaration: Declaration) -> None:
    """Add a declaration, in place of an earlier one of the same class."""
    _DECLARED[declaration.block_name] = declaration


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _declaration_of(module: nn.Module) -> Declaration | None:
    for kind in type(module).__mro__:
        declaration = _DECLARED.get(_dotted(kind))
        if declaration is not None and declaration.block_class in (kind, _dotted(kind)):
            return declaration
    return None


class PerExpertLinears:
    """The convention of every declared class."""

    NAME = "per-expert Linears"

    def matches(self, module: nn.Module) -> bool:
        """True for declared classes."""
        return _declaration_of(module) is not None

    def num_experts(self, module: Any) -> int:
        """N, the length of the container."""
        try:
            return len(self._of(module).container(module))
        except AttributeError:
            return 0

    def first_weight(self, module: Any) -> Tensor | None:
        """Return the weight of the first projection of the first expert."""
        if self.obstacle(module) is not None:
            return None
        declaration = self._of(module)
        weight: Tensor = declaration.linears(module, declaration.projections[0])[0].weight  # type: ignore[assignment]
        return weight

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        """Features, as the Linears say."""
        declaration = self._of(module)
        return {
            name: _shape(declaration.linears(module, name)[0]) for name in declaration.projections
        }

    def router_child(self, module: Any) -> str | None:
        """As declared."""
        return self._of(module).router

    def only_on_request(self, module: Any) -> bool:
        """Never."""
        return False

    def obstacle(self, module: Any) -> str | None:
        """Something is not as declared, or not loaded."""
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
        """The weight of one Linear."""
        weight: Tensor = self._of(module).linears(module, projection)[expert].weight  # type: ignore[assignment]
        if not weight.is_floating_point() or weight.element_size() == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"{projection} of expert {expert} is quantised ({kind}): nothing can be merged "
                "into it; keep the adapter, or load the model in a floating-point dtype"
            )
        return weight

    def storage(self, module: Any, projection: str) -> ExpertLinears:
        """The Linears, by the names of the experts in the block.

        Raises:
            ModelError: an expert is no module of the block, or is listed twice.
        """
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
        """Hook the block and its Linears."""
        from drlora_torch.models import linears

        return linears.install(self._of(module), module, lora, observer)

    def _of(self, module: nn.Module) -> Declaration:
        declaration = _declaration_of(module)
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
