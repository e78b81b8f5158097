"""LoRA of Linears that are no routed experts: attention, shared experts, dense layers.

The LoRA is a child of its Linear, and a forward hook adds what it gives. So no module is replaced
and no parameter renamed, a Linear may be stored in any number of bits, and of several adapters
only the active one has hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from drlora_core import AllocatorEngine
from drlora_torch.attached import AdaptedLinear, Attached
from drlora_torch.lora import parts
from drlora_torch.lora.dense import DenseLoRA
from drlora_torch.options import AdapterOptions


def adapt_linears(
    linears: Mapping[str, nn.Linear], engine: AllocatorEngine, options: AdapterOptions
) -> dict[str, AdaptedLinear]:
    """Make the LoRA of Linears, all at zero."""
    adapted = {}
    for name, linear in linears.items():
        assert options.attention_rank is not None
        lora = DenseLoRA(
            name,
            linear.in_features,
            linear.out_features,
            rank=options.attention_rank,
            scaling=options.attention_scaling(),
            dropout=options.dropout,
            seed=engine.config.seed,
        )
        weight = linear.weight
        lora.to(device=weight.device, dtype=options.lora_dtype(weight.dtype))
        adapted[name] = AdaptedLinear(linear, lora)
    return adapted


def install(attached: Attached) -> Callable[[], None]:
    """Let the Linears run with their LoRA; return the undo."""
    handles = []
    for linear, lora in ((each.linear, each.lora) for each in attached.dense.values()):
        if not any(map(parts.is_sharded, lora.parameters())):
            lora.to(device=linear.weight.device)
        lora.train(linear.training)
        handles.append(linear.register_forward_hook(_adding(attached, lora), with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _adding(attached: Attached, lora: DenseLoRA) -> Callable[..., Tensor]:
    def add_update(
        linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not attached.enabled:
            return output
        (inputs,) = (*args, *kwargs.values())
        summed: Tensor = output + lora(inputs)
        return summed.to(output.dtype)

    return add_update
