"""Numbers of parameters; packed weights count as the values that their codes stand for.

Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drlora_torch.models.discovery import discover
from drlora_torch.models.records import MoELayer


def trainable_and_all(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that require gradients, and all, as PEFT does."""
    trainable = sum(_size(p) for p in model.parameters() if p.requires_grad)
    return trainable, count_parameters(model, discover(model))


def describe_trainable(model: nn.Module) -> str:
    """Say it in PEFT's words."""
    trainable, total = trainable_and_all(model)
    share = 100 * trainable / max(total, 1)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def count_parameters(model: nn.Module, layers: Sequence[MoELayer]) -> int:
    """Parameters of a model; a packed layer counts as the N I O that its codes stand for."""
    count = sum(_size(parameter) for parameter in model.parameters())
    for layer in layers:
        module = model.get_submodule(layer.name)
        packed = [_size(p) for p in module.parameters() if _is_packed(p)]
        if packed and layer.projections:
            weights = sum(s.in_features * s.out_features for s in layer.projections.values())
            count += layer.num_experts * weights - sum(packed)
    return count


def count_bytes(model: nn.Module) -> int:
    """Bytes of the parameters; bitsandbytes packs its own only when they leave the meta device."""
    return sum(
        -(-parameter.numel() // 2) if _will_be_packed(parameter) else parameter.nbytes
        for parameter in model.parameters()
    )


def _will_be_packed(parameter: Tensor) -> bool:
    return parameter.is_meta and type(parameter).__name__ == "Params4bit"


def _is_packed(parameter: Tensor) -> bool:
    """True for codes and their scales, but for scales that are floats of two bytes or more."""
    return not parameter.is_floating_point() or parameter.element_size() == 1


def _size(parameter: Tensor) -> int:
    """Values of a parameter; bitsandbytes keeps the shape that two values a byte stand for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
