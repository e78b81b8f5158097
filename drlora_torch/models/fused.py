"""What conventions share that keep the weights of all experts in one tensor, known by their class.

Such a module does not ask a registry how to run, so a forward of ours takes the place of its own
on the instance, and goes away with ``detach``; inside ``adapter.disabled()`` its own runs.

Shape letters: N experts, I input and O output features, S = T * K (token, expert) pairs.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.dispatch import Dispatch
from drlora_torch.kernels import expert_linear
from drlora_torch.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.convention import ATTACHMENT, Observer, weights_obstacle
from drlora_torch.models.storage import ExpertParameter


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """Set on an adapted layer; holds the adapter, so that the layer cannot be copied."""

    lora: ExpertLoRA
    observer: Observer


def is_of_class(module: nn.Module, names: tuple[str, ...]) -> bool:
    """True if the class of a module, or one it derives from, has one of these dotted names."""
    return any(f"{c.__module__}.{c.__qualname__}" in names for c in type(module).__mro__)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the autocast dtype inside autocast, else that of the base weights."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def give_lora(module: nn.Module, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
    """Note on a layer which LoRA it runs with; return what takes the note away."""
    vars(module)[ATTACHMENT] = Attachment(lora, observer)

    def remove() -> None:
        del vars(module)[ATTACHMENT]

    return remove


def run_instead(
    module: nn.Module, adapted: Callable[..., Tensor], observer: Observer
) -> Callable[[], None]:
    """Run ``adapted`` in place of the forward of a module; return what gives its own back.

    Accelerate, which moves inputs to the device of a module, keeps a module's own forward under
    another name: that one is replaced then, so that inputs are still moved.
    """
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"
    own = getattr(module, place)
    inherited = place not in vars(module)

    # It counts tokens and loops over experts: a compiled model leaves its graph here.
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


def all_of(removals: list[Callable[[], None]]) -> Callable[[], None]:
    """One function that undoes several changes, last first."""

    def remove() -> None:
        for removal in reversed(removals):
            removal()

    return remove


class FusedConvention(abc.ABC):
    """Base of the conventions whose class says everything; final classes fill in the blanks."""

    NAME: str
    CLASSES: tuple[str, ...]
    """Dotted names of the classes of a layer."""
    TRANSPOSED: Mapping[str, bool]
    """By projection, in the order they are applied: True for weights [N, I, O]."""
    DIMS: int = 3
    """Dimensions of a weight as the model keeps it."""

    def matches(self, module: nn.Module) -> bool:
        """True for the classes of the convention."""
        return is_of_class(module, self.CLASSES)

    def parameter(self, module: Any, projection: str) -> Any:
        """Return the weight of all experts, as the model keeps it."""
        return getattr(module, projection, None)

    def stacked(self, module: Any, projection: str) -> Tensor:
        """Return the weight of all experts by expert, [N, O, I], or [N, I, O] if transposed."""
        weight: Tensor = self.parameter(module, projection)
        return weight

    def num_experts(self, module: Any) -> int:
        """N, as the last projection says."""
        weight = self.parameter(module, list(self.TRANSPOSED)[-1])
        return 0 if weight is None else int(weight.shape[0])

    def first_weight(self, module: Any) -> Tensor | None:
        """Return the weight that is applied first."""
        weight: Tensor | None = self.parameter(module, next(iter(self.TRANSPOSED)))
        return weight

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        """Features, from the declared axes."""
        shapes = {}
        for name in self.TRANSPOSED:
            outputs, inputs = self.expert_weight(module, name, 0).shape
            shapes[name] = ProjectionShape(inputs, outputs)
        return shapes

    def router_child(self, module: Any) -> str | None:
        """None: the router stands beside the layer."""
        return None

    def only_on_request(self, module: Any) -> bool:
        """Never."""
        return False

    def obstacle(self, module: Any) -> str | None:
        """Missing, quantised or unloaded weights."""
        weights = [(name, self.parameter(module, name)) for name in self.TRANSPOSED]
        return weights_obstacle(weights, self.DIMS)

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        """The weight of one expert, a view [O, I]."""
        weight = self.stacked(module, projection)[expert]
        return weight.T if self.TRANSPOSED[projection] else weight

    def storage(self, module: Any, projection: str) -> ExpertParameter:
        """A parameter of the layer."""
        return ExpertParameter(name=projection, transposed=self.TRANSPOSED[projection])

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
            transposed=self.TRANSPOSED[projection],
            **options,
        )

    @abc.abstractmethod
    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        """Give a layer its LoRA; return the function that takes it back out exactly."""


class RoutedConvention(FusedConvention):
    """Base of those called as the interface is: ``experts(hidden, top_k_index, top_k_weights)``."""

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        """Give the experts module its LoRA and a forward that uses it."""

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            observer.routed(lora.name, top_k_index, top_k_weights)
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            output = self.run(module, lora, tokens, top_k_index, top_k_weights)
            return output.to(hidden_states.dtype).view(hidden_states.shape)

        return all_of([give_lora(module, lora, observer), run_instead(module, forward, observer)])

    @abc.abstractmethod
    def run(
        self, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Experts with LoRA on tokens [T, H] and their routing [T, K]; returns [T, H]."""
