"""Experts in one tensor per projection, known by the class of their layer.

Such a module does not ask a registry how to run, so our forward takes the place of its own on the
instance, and goes away with ``detach``; inside ``adapter.disabled()`` its own runs.

Shape letters: T tokens, K experts per token, N experts, I input and O output features,
S = T * K (token, expert) pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import expert_linear
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.convention import Observer, give_lora, undo_all, weights_obstacle
from drlora_torch.models.location import ExpertParameter

Install = Callable[["Fused", Any, ExpertLoRA, Observer], Callable[[], None]]
"""Let a layer (the module) run with a LoRA; return what undoes that."""
Run = Callable[["Fused", Any, ExpertLoRA, Tensor, Tensor, Tensor], Tensor]
"""Experts of a layer on tokens [T, H] and their routing [T, K] (index, weights); gives [T, H]."""


def own_length(module: Any, weight: Tensor) -> int:
    """N, where the last weight has a row per expert."""
    return int(weight.shape[0])


def own_weight(module: Any, weight: Tensor) -> Tensor:
    """The weight by expert, where the model keeps it so."""
    return weight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """A convention that the class of a layer tells; one instance a family."""

    name: str
    classes: tuple[str, ...]
    """Dotted names of the classes of a layer."""
    weights: Mapping[str, ExpertParameter]
    """Where each projection is, in the order they are applied."""
    install_into: Install
    dims: int = 3
    """Dimensions of a weight as the model keeps it."""
    count: Callable[[Any, Tensor], int] = own_length
    """N of a layer, from the layer and its last weight."""
    by_expert: Callable[[Any, Tensor], Tensor] = own_weight
    """View a weight of a layer by expert, [N, O, I], or [N, I, O] if transposed."""
    router: str | None = None
    """Name of the router inside the layer; None if it stands beside it."""
    on_request: str | None = None
    """Dotted name of a class that is adapted only if the option ``layers`` names its layer."""

    def matches(self, module: nn.Module) -> bool:
        """True for the classes of the convention."""
        return is_of_class(module, self.classes)

    def parameter(self, module: Any, projection: str) -> Any:
        """The weight of all experts as the model keeps it; None if the layer has none."""
        where = self.weights[projection]
        return getattr(module.get_submodule(where.module), where.name, None)

    def stacked(self, module: Any, projection: str) -> Tensor:
        """The weight of all experts by expert, [N, O, I], or [N, I, O] if transposed."""
        return self.by_expert(module, self.parameter(module, projection))

    def num_experts(self, module: Any) -> int:
        weight = self.parameter(module, list(self.weights)[-1])
        return 0 if weight is None else self.count(module, weight)

    def first_weight(self, module: Any) -> Tensor | None:
        weight: Tensor | None = self.parameter(module, next(iter(self.weights)))
        return weight

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        shapes = {}
        for projection in self.weights:
            outputs, inputs = self.expert_weight(module, projection, 0).shape
            shapes[projection] = ProjectionShape(inputs, outputs)
        return shapes

    def router_child(self, module: Any) -> str | None:
        return self.router

    def only_on_request(self, module: Any) -> bool:
        return self.on_request is not None and is_of_class(module, (self.on_request,))

    def obstacle(self, module: Any) -> str | None:
        weights = [(projection, self.parameter(module, projection)) for projection in self.weights]
        return weights_obstacle(weights, self.dims)

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        return self.install_into(self, module, lora, observer)

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        weight = self.stacked(module, projection)[expert]
        return weight.T if self.weights[projection].transposed else weight

    def location(self, module: Any, projection: str) -> ExpertParameter:
        return self.weights[projection]

    def compute_dtype(self, module: Any) -> torch.dtype:
        """Return the dtype that a layer computes in."""
        return compute_dtype(self.parameter(module, next(iter(self.weights))))

    def project(
        self,
        module: Any,
        projection: str,
        lora: ExpertLoRA,
        inputs: Tensor,
        dispatch: Dispatch,
        **options: Any,
    ) -> Tensor:
        """Multiply sorted rows with a projection of their experts, see ``expert_linear``."""
        return expert_linear(
            inputs,
            self.stacked(module, projection),
            None,
            lora.factors(projection),
            dispatch,
            transposed=self.weights[projection].transposed,
            **options,
        )


def routed(run: Run) -> Install:
    """Install experts that are called as ``experts(hidden, top_k_index, top_k_weights)``."""

    def install(
        convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer
    ) -> Callable[[], None]:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            output = run(convention, module, lora, tokens, top_k_index, top_k_weights)
            output = output.to(hidden_states.dtype)
            observer.routed(lora, output, top_k_index, top_k_weights)
            return output.view(hidden_states.shape)

        return undo_all([give_lora(module, lora, observer), run_instead(module, forward, observer)])

    return install


def is_of_class(module: nn.Module, names: tuple[str, ...]) -> bool:
    """True if the class of a module, or one it derives from, has one of these dotted names."""
    return any(f"{c.__module__}.{c.__qualname__}" in names for c in type(module).__mro__)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the autocast dtype inside autocast, else that of the base weights."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def run_instead(
    module: nn.Module, adapted: Callable[..., Tensor], observer: Observer
) -> Callable[[], None]:
    """Run ``adapted`` in place of the forward of a module; return what gives its own back.

    Accelerate, which moves inputs to the device of a module, keeps the module's own forward under
    another name: that one is replaced then, so that inputs are still moved.
    """
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"
    own = getattr(module, place)
    inherited = place not in vars(module)

    # It loops over experts and observes: a compiled model leaves its graph here.
    adapted = torch.compiler.disable(adapted)  # type: ignore[no-untyped-call]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (adapted if observer.enabled else own)(*args, **kwargs)

    vars(module)[place] = forward

    def remove() -> None:
        if inherited:
            del vars(module)[place]
        else:
            vars(module)[place] = own

    return remove
