"""PEFT's LoRA of a parameter with the weights of all experts (``target_parameters``).

It has one rank for all experts of a parameter: smaller ones are padded with zeros, which changes
nothing but memory. The factors are flat: lora_A [N*R, I] has the expert slowest, lora_B [O, R*N]
has it fastest. Several parameters of one module are wrappers within wrappers, in the order of the
module's parameters: the first is the innermost, and each ``base_layer`` of its key names one layer
above it.

PEFT 0.21 reads a weight [N, x, y] as [N, O, I], and as [N, I, O] where its module says
``is_transposed``. Where that is the wrong way round, A and B change places: (B A)^T = A^T B^T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from drlora_torch.errors import CheckpointError
from drlora_torch.models.location import ExpertParameter
from drlora_torch.storage.peft.factors import Factors
from drlora_torch.storage.peft.names import joined


class Target(NamedTuple):
    """A parameter as PEFT sees it."""

    projection: str
    parameter: str
    """Qualified name, as ``target_parameters`` has it."""
    key: str
    """Name of its wrapper in the state dict."""
    experts: int
    """Experts that PEFT counts: those of the parameter, some of which may not be adapted."""
    swapped: bool
    """PEFT takes inputs for outputs."""


def targets(layer: nn.Module, name: str, chosen: dict[str, ExpertParameter]) -> list[Target]:
    """What PEFT makes of the chosen projections of a layer.

    Raises:
        CheckpointError: PEFT cannot wrap the module of a parameter.
    """
    holders: dict[str, list[str]] = {}
    for projection, where in chosen.items():
        _check(layer, name, projection, where)
        holders.setdefault(where.module, []).append(projection)
    found = {}
    for holder, projections in holders.items():
        module, full = layer.get_submodule(holder), joined(name, holder)
        order = _in_order(module, [chosen[each].name for each in projections])
        for projection in projections:
            where = chosen[projection]
            weight: Tensor = getattr(module, where.name)
            depth = len(order) - 1 - order.index(where.name)
            found[projection] = Target(
                projection,
                joined(full, where.name),
                full + ".base_layer" * depth,
                weight.shape[0],
                where.transposed != getattr(module, "is_transposed", False),
            )
    return [found[projection] for projection in chosen]


def flat(factors: Factors, target: Target) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as PEFT keeps them."""
    lora_A, lora_B = factors
    if target.swapped:
        lora_A, lora_B = lora_B.transpose(1, 2), lora_A.transpose(1, 2)
    missing = target.experts - lora_A.shape[0]
    if missing:
        pad = (0, 0, 0, 0, 0, missing)
        lora_A, lora_B = (nn.functional.pad(each, pad) for each in (lora_A, lora_B))
    return lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)


def unflat(flat_A: Tensor, flat_B: Tensor, target: Target, experts: int) -> Factors:
    """Undo :func:`flat`.

    Raises:
        CheckpointError: they are not of as many experts, or of experts that are not adapted.
    """
    try:
        lora_A = flat_A.reshape(target.experts, -1, flat_A.shape[-1])
        lora_B = flat_B.reshape(flat_B.shape[0], -1, target.experts).permute(2, 0, 1)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"no LoRA of {target.experts} experts at {target.key!r}: {error}"
        ) from error
    if target.swapped:
        lora_A, lora_B = lora_B.transpose(1, 2), lora_A.transpose(1, 2)
    return Factors(lora_A[:experts], lora_B[:experts])


def _check(layer: nn.Module, name: str, projection: str, where: ExpertParameter) -> None:
    if where.read_from_outside:
        raise CheckpointError(
            f"PEFT cannot adapt {projection} of layer {name!r} ({type(layer).__name__}): it adds a "
            f"LoRA while the module {where.module!r} runs, but that weight is read before; "
            "export_peft(per_expert=True) or merge_and_save() can write it"
        )
    if not joined(name, where.module):
        raise CheckpointError(
            "PEFT cannot adapt a parameter of the model itself, only of a module in it"
        )


def _in_order(module: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Parameters in the order in which PEFT wraps them."""
    wanted = set(parameters)
    return [name for name, _ in module.named_parameters(recurse=False) if name in wanted]
