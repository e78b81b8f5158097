"""``register_moe``: a class of blocks with per-expert Linears, declared in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from drlora_torch.errors import ModelError
from drlora_torch.models import nllb_moe, switch_transformers
from drlora_torch.models.convention import dotted_name
from drlora_torch.models.linears import PerExpertLinears, Routing

_DECLARED: dict[type, PerExpertLinears] = {}  # what users declared; known families are constants
_FAMILIES = {
    switch_transformers.BLOCK: switch_transformers.SWITCH_TRANSFORMERS,
    nllb_moe.BLOCK: nllb_moe.NLLB_MOE,
}


def register_moe(
    block_class: type[nn.Module],
    *,
    experts: str | Callable[[Any], Sequence[nn.Module]],
    projections: Sequence[str],
    router: str | None,
    routing: Routing,
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
    _DECLARED[block_class] = PerExpertLinears(experts, names, router, routing)


def declaration_of(module: nn.Module) -> PerExpertLinears | None:
    """Find the declaration of a module's class or of a base of it; a user's before a family's."""
    for kind in type(module).__mro__:
        if found := _DECLARED.get(kind) or _FAMILIES.get(dotted_name(kind)):
            return found
    return None
