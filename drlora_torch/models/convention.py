"""What drlora must know of a way to store and call experts: one object per convention.

A convention is declared, never guessed from shapes: by flags of the module, by its class, or by
:func:`drlora_torch.register_moe`.

Shape letters: T tokens, K experts per token, N experts, I input and O output features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.location import Location

ATTACHMENT = "_drlora_attachment"
"""Set on a module that runs with a LoRA: (lora, observer), which refuses to be copied."""
ON_META = "is on the meta device; load the weights first, without offloading them (to CPU or disk)"

PACK = (
    "load the experts in a floating-point dtype; drlora_torch.quantize_experts(model) packs them "
    "into 4 bits"
)

Undo = Callable[[], None]
"""Reverts a change of the model exactly."""


class Observer(Protocol):
    """The adapter as its layers see it."""

    @property
    def enabled(self) -> bool:
        """False while the base model is wanted."""

    def routed(
        self, lora: ExpertLoRA, output: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Count the routing [T, K] once backward reaches ``output``, which is returned.

        An index >= N is no expert. In a graph of ``torch.compile`` another tensor is returned, and
        that one must be used.
        """

    def look_at(self, values: Tensor, consume: Callable[[NDArray[np.float64]], None]) -> None:
        """Have the host look at values of a forward [n], at once or when it does not wait."""


class Convention(Protocol):
    """How the layers of one kind store and call their experts; ``module`` is such a layer."""

    @property
    def name(self) -> str:
        """As :class:`drlora_torch.MoELayer` gives it."""

    @property
    def router(self) -> str | None:
        """Name of the router inside the layer; None if it stands beside it."""

    @property
    def only_on_request(self) -> bool:
        """True if a layer is adapted only where the option ``layers`` names it."""

    def num_experts(self, module: Any) -> int:
        """N; 0 where it cannot be told."""

    def first_weight(self, module: Any) -> Tensor | None:
        """Return a weight whose dtype and device speak for the layer; None if it has none."""

    def storage(self, module: Any) -> tuple[str, int]:
        """How the expert weights are stored, and the bytes they take."""

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        """Features by projection, in the order they are applied; only without an obstacle."""

    def obstacle(self, module: Any, *, on_meta: bool = False) -> str | None:
        """Say why a layer cannot be adapted, None if it can; ``on_meta`` allows the meta device."""

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
        """Let a layer run with a LoRA, a child of it; of several adapters only the active one."""

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        """The weight of one expert [O, I]: a view, to which one can write, unless it is packed."""

    def is_packed(self, module: Any) -> bool:
        """True if :meth:`expert_weight` unpacks the weights."""

    def location(self, module: Any, projection: str) -> Location:
        """Tell the parameter or the Linears that hold the weights of a projection."""


def dotted_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def dtype_name(weight: Tensor | None) -> str:
    return "unknown" if weight is None else str(weight.dtype).removeprefix("torch.")


def give_lora(module: nn.Module, lora: ExpertLoRA, observer: Observer) -> Undo:
    vars(module)[ATTACHMENT] = (lora, observer)
    return lambda: delattr(module, ATTACHMENT)


def undo_all(*undos: Undo) -> Undo:
    """Return one function that undoes several changes, last first."""
    stack = contextlib.ExitStack()
    for undo in undos:
        stack.callback(undo)
    return stack.close


def quantized(weight: Tensor) -> str | None:
    """Say that a weight is quantized; None if it is not."""
    if weight.is_floating_point() and weight.element_size() > 1:
        return None
    kind = str(weight.dtype).removeprefix("torch.")
    return f"is quantized ({kind}); load the model in a floating-point dtype"


def unreadable(holder: nn.Module, name: str) -> str | None:
    """Say why a weight of all experts is not what drlora can read; None if it is."""
    weight = getattr(holder, name)
    if hasattr(weight, "__tensor_flatten__") and not parts.is_sharded(weight):
        return f"is a {type(weight).__name__} of {type(weight).__module__.split('.')[0]}; {PACK}"
    if is_parametrized(holder, name):
        kinds = sorted({type(each).__name__ for each in _parametrizations(holder, name)})
        return f"is computed anew at every access ({', '.join(kinds)}); {PACK}"
    return quantized(weight)


def _parametrizations(holder: Any, name: str) -> Any:
    return holder.parametrizations[name]
