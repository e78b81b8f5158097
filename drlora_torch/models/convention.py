"""What drlora must know of a way to store and call experts: one object per convention.

A convention is declared, never guessed from shapes: by flags of the module, by its class, or by
:func:`drlora_torch.register_moe`. Conventions are tried in the order of ``conventions.py``.

Shape letters: T tokens, K experts per token, N experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.location import Location

ATTACHMENT = "_drlora_attachment"  # set on every module that runs with a LoRA


class Observer(Protocol):
    """The adapter as its layers see it."""

    @property
    def enabled(self) -> bool:
        """False while the base model is wanted."""
        ...

    def routed(
        self, lora: ExpertLoRA, output: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> None:
        """Count the routing of a forward once the backward pass reaches ``output``.

        Args:
            lora: the layer.
            output: what the experts return, before anything else is computed from it.
            top_k_index: chosen experts, integers [T, K]; values >= N are sentinels.
            top_k_weights: what their outputs are multiplied with, [T, K].
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """Set on an adapted layer; holds the adapter, so that the layer cannot be copied."""

    lora: ExpertLoRA
    observer: Observer


class Convention(Protocol):
    """How the layers of one kind store and call their experts; ``module`` is such a layer."""

    @property
    def name(self) -> str:
        """As :class:`drlora_torch.MoELayer` gives it."""
        ...

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module is such a layer, adapted or not."""
        ...

    def num_experts(self, module: Any) -> int:
        """N; 0 where it cannot be told."""
        ...

    def first_weight(self, module: Any) -> Tensor | None:
        """Return a weight whose dtype and device speak for the layer; None if it has none."""
        ...

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        """Features by projection, in the order they are applied; only without an obstacle."""
        ...

    def router_child(self, module: Any) -> str | None:
        """Name of the router inside the layer; None if it stands beside it."""
        ...

    def only_on_request(self, module: Any) -> bool:
        """Tell whether a layer is adapted only if the option ``layers`` names it."""
        ...

    def obstacle(self, module: Any) -> str | None:
        """Say why a layer cannot be adapted, None if it can."""
        ...

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        """Let a layer run with a LoRA, a child of it; return what undoes that exactly.

        Of several adapters only the active one is installed.
        """
        ...

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        """The weight of one expert, a view [O, I]: what is written to it, the model computes."""
        ...

    def location(self, module: Any, projection: str) -> Location:
        """Tell the parameter or the Linears that hold the weights of a projection."""
        ...


def give_lora(module: nn.Module, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
    """Note on a layer which LoRA it runs with; return what takes the note away."""
    vars(module)[ATTACHMENT] = Attachment(lora, observer)

    def remove() -> None:
        del vars(module)[ATTACHMENT]

    return remove


def undo_all(undos: list[Callable[[], None]]) -> Callable[[], None]:
    """One function that undoes several changes, last first."""

    def undo() -> None:
        while undos:
            undos.pop()()

    return undo


def weights_obstacle(weights: Iterable[tuple[str, object]], dims: int) -> str | None:
    """Say why a layer with these weights cannot be adapted: missing, meta, offloaded, quantised."""
    for name, weight in weights:
        if not isinstance(weight, Tensor) or weight.dim() != dims:
            return f"its {name} is not a {dims}-D tensor"
        if weight.is_meta:
            return (
                f"its {name} is on the meta device; load the weights first, without offloading "
                "them (to CPU or disk)"
            )
        if not weight.is_floating_point() or weight.element_size() == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"its {name} is quantised ({kind}); load the model in a floating-point dtype"
    return None
