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

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from drlora_torch.attached import AdaptedLayer
from drlora_torch.errors import CheckpointError
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter
from drlora_torch.storage.peft.factors import Expert, Factors
from drlora_torch.storage.peft.files import PREFIX, joined, own_name, scaling_of


class Target(NamedTuple):
    """A parameter as PEFT sees it."""

    parameter: str
    """Qualified name, as ``target_parameters`` has it."""
    key: str
    """Name of its wrapper in the state dict."""
    experts: int
    """Experts that PEFT counts: those of the parameter, some of which may not be adapted."""
    swapped: bool
    """PEFT takes inputs for outputs."""


def parameters_of(layer: AdaptedLayer) -> dict[str, ExpertParameter]:
    convention = convention_of(layer.experts)
    found = {p: convention.location(layer.experts, p) for p, _ in layer.lora.items()}
    return {p: where for p, where in found.items() if isinstance(where, ExpertParameter)}


def qualified(layer: AdaptedLayer, where: ExpertParameter) -> str:
    return joined(own_name(layer.record.name), where.module, where.name)


def targets(layer: AdaptedLayer, suffixes: tuple[str, ...] = ("",)) -> dict[str, Target]:
    """What PEFT makes of the parameters of a layer whose names, after a dot, end like this."""
    name = layer.record.name
    chosen = {
        projection: where
        for projection, where in parameters_of(layer).items()
        if f".{qualified(layer, where)}".endswith(suffixes)
    }
    found = {}
    for projection, where in chosen.items():
        if where.read_from_outside:
            raise CheckpointError(
                f"PEFT cannot adapt {projection} of layer {name!r}, whose weight is read outside "
                "its module; use export_peft(per_expert=True) or merge_and_save()"
            )
        wrapper = joined(own_name(name), where.module)
        if not wrapper:
            raise CheckpointError("PEFT cannot adapt a parameter of the model itself")
        module = layer.experts.get_submodule(where.module)
        wrapped = {each.name for each in chosen.values() if each.module == where.module}
        order = [each for each, _ in module.named_parameters(recurse=False) if each in wrapped]
        outer = len(order) - 1 - order.index(where.name)
        found[projection] = Target(
            qualified(layer, where),
            wrapper + ".base_layer" * outer,
            getattr(module, where.name).shape[0],
            where.transposed != getattr(module, "is_transposed", False),
        )
    return found


def tensors(factors: Factors, target: Target) -> dict[str, Tensor]:
    """lora_A and lora_B as PEFT saves them."""
    lora_A, lora_B = factors
    if target.swapped:
        lora_A, lora_B = lora_B.transpose(1, 2), lora_A.transpose(1, 2)
    missing = target.experts - lora_A.shape[0]
    if missing:
        pad = (0, 0, 0, 0, 0, missing)
        lora_A, lora_B = (nn.functional.pad(each, pad) for each in (lora_A, lora_B))
    return {
        f"{PREFIX}{target.key}.lora_A.weight": lora_A.flatten(0, 1),
        f"{PREFIX}{target.key}.lora_B.weight": lora_B.permute(1, 2, 0).flatten(1),
    }


def take(
    held: dict[str, Tensor], config: Mapping[str, Any], target: Target, experts: int
) -> list[Expert]:
    """Take the LoRA of a target's first experts out of ``held``, scaled for a scaling of 1."""
    try:
        flat_A, flat_B = (held.pop(f"{PREFIX}{target.key}.lora_{part}.weight") for part in "AB")
        lora_A = flat_A.reshape(target.experts, -1, flat_A.shape[-1])
        lora_B = flat_B.reshape(flat_B.shape[0], -1, target.experts).permute(2, 0, 1)
    except (KeyError, RuntimeError, IndexError) as error:
        message = f"no LoRA of {target.experts} experts at {target.key!r}: {error}"
        raise CheckpointError(message) from error
    if target.swapped:
        lora_A, lora_B = lora_B.transpose(1, 2), lora_A.transpose(1, 2)
    lora_B = scaling_of(config, target.parameter) * lora_B
    return list(zip(lora_A[:experts], lora_B[:experts], strict=True))
