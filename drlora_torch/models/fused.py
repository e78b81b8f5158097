"""Experts in one tensor per projection.

A family whose module does not ask a registry how to run gets our forward in place of its own, on
the instance, until ``detach``; inside ``adapter.disabled()`` its own runs.

Shape letters: T tokens, K experts per token, N experts, I input and O output features, H model
width, S = T * K (token, expert) pairs.
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
from drlora_torch.models.convention import (
    ON_META,
    Observer,
    Undo,
    dotted_name,
    give_lora,
    quantized,
    undo_all,
)
from drlora_torch.models.location import ExpertParameter

GATE_UP_DOWN = {
    name: ExpertParameter(name=name, transposed=False) for name in ("gate_up_proj", "down_proj")
}
"""``gate_up_proj`` [N, 2I, H] and ``down_proj`` [N, H, I], as most families have them."""
Install = Callable[["Fused", Any, ExpertLoRA, Observer], Undo]
"""Let a layer (the module) run with a LoRA; return what undoes that."""
Project = Callable[..., Tensor]
"""From the name of a projection and its inputs to its outputs; options of ``expert_linear``."""
Run = Callable[[Any, Project, Tensor, Tensor, Tensor], Tensor]
"""Experts of a layer on tokens [T, H] and their routing [T, K] (index, weights); gives [T, H]."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """A convention of experts in one tensor per projection; one instance a family."""

    name: str
    matches: Callable[[nn.Module], bool]
    weights: Callable[[Any], Mapping[str, ExpertParameter]]
    """Where a layer has each projection, in the order they are applied."""
    install_into: Install
    dims: int = 3
    """Dimensions of a weight as the model keeps it."""
    by_expert: Callable[[Any, Tensor], Tensor] = lambda module, weight: weight
    """View a weight of a layer by expert, [N, O, I], or [N, I, O] if transposed."""
    router: str | None = None
    only_on_request: bool = False

    def parameters(self, module: Any) -> dict[str, Any]:
        """The weights of all experts as the model keeps them; None for one that it lacks."""
        return {
            projection: getattr(module.get_submodule(where.module), where.name, None)
            for projection, where in self.weights(module).items()
        }

    def stacked(self, module: Any, projection: str) -> Tensor:
        """The weight of all experts by expert, [N, O, I], or [N, I, O] if transposed."""
        return self.by_expert(module, self.parameters(module)[projection])

    def num_experts(self, module: Any) -> int:
        weight = self.first_weight(module)
        return 0 if weight is None else len(self.by_expert(module, weight))

    def first_weight(self, module: Any) -> Tensor | None:
        first: Tensor | None = next(iter(self.parameters(module).values()))
        return first

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        shapes = {}
        for projection, where in self.weights(module).items():
            _, *features = self.stacked(module, projection).shape
            shapes[projection] = ProjectionShape(*features[:: 1 if where.transposed else -1])
        return shapes

    def obstacle(self, module: Any) -> str | None:
        for name, weight in self.parameters(module).items():
            if not isinstance(weight, Tensor) or weight.dim() != self.dims:
                return f"its {name} is not a {self.dims}-D tensor"
            if (reason := ON_META if weight.is_meta else quantized(weight)) is not None:
                return f"its {name} {reason}"
        counts = [len(self.stacked(module, projection)) for projection in self.weights(module)]
        if len(set(counts)) > 1:
            return f"its projections have {' and '.join(map(str, counts))} experts"
        return None

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
        return self.install_into(self, module, lora, observer)

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        weight = self.stacked(module, projection)[expert]
        return weight.T if self.location(module, projection).transposed else weight

    def location(self, module: Any, projection: str) -> ExpertParameter:
        return self.weights(module)[projection]

    def projector(self, module: Any, lora: ExpertLoRA, dispatch: Dispatch) -> Project:
        """Return the function that multiplies sorted rows with a projection of their experts."""
        weights, parameters = self.weights(module), self.parameters(module)
        dtype = compute_dtype(parameters[next(iter(weights))])

        def project(
            projection: str, inputs: Tensor, bias: Tensor | None = None, **options: Any
        ) -> Tensor:
            return expert_linear(
                inputs.to(dtype),
                self.by_expert(module, parameters[projection]),
                bias,
                lora.factors(projection),
                dispatch,
                transposed=weights[projection].transposed,
                **options,
            )

        return project


def is_a(class_name: str) -> Callable[[nn.Module], bool]:
    """Return the test for modules of a class, given by its dotted name, or of a subclass."""
    return lambda module: class_name in map(dotted_name, type(module).__mro__)


def routed(run: Run) -> Install:
    """Adapt experts that are called as ``experts(hidden_states, top_k_index, top_k_weights)``."""

    def install(convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            dispatch = Dispatch.sort(top_k_index, lora.table.num_experts)
            project = convention.projector(module, lora, dispatch)
            output = run(module, project, tokens, top_k_index, top_k_weights)
            output = output.to(hidden_states.dtype)
            observer.routed(lora, output, top_k_index, top_k_weights)
            return output.view(hidden_states.shape)

        return undo_all(give_lora(module, lora, observer), run_instead(module, forward, observer))

    return install


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the autocast dtype inside autocast, else that of the base weights."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def run_instead(module: nn.Module, adapted: Callable[..., Tensor], observer: Observer) -> Undo:
    """Run ``adapted`` in place of the forward of a module.

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
        del vars(module)[place]
        if not inherited:
            vars(module)[place] = own

    return remove
