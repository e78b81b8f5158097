"""What drlora must know of a way to store and call experts: one module or object per convention.

A convention is declared, never guessed from shapes: by flags of the module, by its class, or by
:func:`drlora_torch.register_moe`. Every convention is tried in the order of ``conventions.py``.

Shape letters: T tokens, K experts per token, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from drlora_torch.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.storage import Storage

ATTACHMENT = "_drlora_attachment"  # set on every module that runs with a LoRA


class Observer(Protocol):
    """Told of every routing decision that an adapted layer gets."""

    def routed(self, name: str, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Take the routing of one forward, [T, K] each."""
        ...

    @property
    def enabled(self) -> bool:
        """False while the base model is wanted."""
        ...


class Convention(Protocol):
    """How the layers of one kind store and call their experts; ``module`` is such a layer."""

    NAME: str
    """As :class:`drlora_torch.MoELayer` gives it."""

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
        """Features by projection, in the order they are applied; only if nothing hinders."""
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

    def storage(self, module: Any, projection: str) -> Storage:
        """Tell the parameter or the Linears that hold the weights of a projection."""
        ...


def child_name(adapter_name: str) -> str:
    """Name of an adapter's ExpertLoRA in the modules that it adapts.

    Example:
        >>> child_name("default"), child_name("law")
        ('drlora', 'drlora_law')
    """
    return "drlora" if adapter_name == "default" else f"drlora_{adapter_name}"


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
