"""Experts in one tensor per projection.

A family whose module does not ask a registry how to run gets our forward in place of its own, on
the instance, until ``detach``; inside ``adapter.disabled()`` its own runs.

Shape letters: T tokens, K experts per token, N experts, I input and O output features, H model
width, S = T * K (token, expert) pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.errors import ModelError
from drlora_torch.lora import parts
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import expert_linear
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.lora.stored import Dense, Stored
from drlora_torch.models.convention import (
    ON_META,
    Observer,
    Undo,
    dotted_name,
    give_lora,
    undo_all,
    unreadable,
)
from drlora_torch.models.location import ExpertParameter
from drlora_torch.quantized import holders

GATE_UP_DOWN = {
    name: ExpertParameter(name=name, transposed=False) for name in ("gate_up_proj", "down_proj")
}
"""``gate_up_proj`` [N, 2I, H] and ``down_proj`` [N, H, I], as most families have them."""
Install = Callable[["Fused", Any, ExpertLoRA, Observer], Undo]
"""Let a layer (the module) run with a LoRA; return what undoes that."""
Project = Callable[..., Tensor]
"""From the name of a projection and its inputs to its outputs; options of ``expert_linear``."""
Forward = Callable[..., Tensor]
"""What a module runs without LoRA."""
Run = Callable[[Any, Project, Tensor, Tensor, Tensor], Tensor]
"""Experts of a layer on tokens [T, H] and their routing [T, K] (index, weights); gives [T, H]."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """How layers run whose weights are packed, where no LoRA is active."""

    start: Callable[[Any], None]
    stop: Callable[[Any], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """A convention of experts in one tensor per projection; one instance a family."""

    name: str
    matches: Callable[[nn.Module], bool]
    weights: Callable[[Any], Mapping[str, ExpertParameter]]
    """Where a layer has each projection, in the order they are applied."""
    install_into: Install
    packed: Packed
    dims: int = 3
    """Dimensions of a weight as the model keeps it."""
    by_expert: Callable[[Any, Tensor], Tensor] = lambda module, weight: weight
    """View a weight of a layer by expert, [N, O, I], or [N, I, O] if transposed."""
    real: Callable[[Any, Tensor], Tensor] = lambda module, by_expert: by_expert
    """Leave out what a tensor has for experts without weights."""
    unfit: Callable[[Any], str | None] = lambda module: None
    """Why the weights of a layer cannot be read, beside what :meth:`obstacle` finds."""
    router: str | None = None
    only_on_request: bool = False

    def parameters(self, module: Any) -> dict[str, Any]:
        """The weights of all experts as the model keeps them; None for one that it lacks."""
        return {
            projection: getattr(module.get_submodule(where.module), where.name, None)
            for projection, where in self.weights(module).items()
        }

    def stored(self, module: Any, projection: str) -> Stored:
        """The weight of all experts, in whatever storage.

        Raises:
            AttributeError, TypeError: there is none, or it is no tensor.
        """
        where = self.location(module, projection)
        holder: Any = module.get_submodule(where.module)
        packed = holders.open_weight(holder, where.name, where.transposed)
        if packed is None:
            weight = self.by_expert(module, getattr(holder, where.name))
            return Dense((self.real(module, weight),), where.transposed)
        real = tuple(self.real(module, tensor) for tensor in packed.tensors)
        return dataclasses.replace(packed, tensors=real)

    def num_experts(self, module: Any) -> int:
        weight = self.first_weight(module)
        return 0 if weight is None else len(weight)

    def first_weight(self, module: Any) -> Tensor | None:
        try:
            return self.stored(module, next(iter(self.weights(module)))).tensors[0]
        except (AttributeError, TypeError, ModelError):  # there is none, or it is no tensor
            return None

    def storage(self, module: Any) -> tuple[str, int]:
        try:
            each = [self.stored(module, projection) for projection in self.weights(module)]
            return each[0].kind, sum(weight.nbytes for weight in each)
        except (AttributeError, TypeError, ModelError):
            return "unknown", 0

    def is_packed(self, module: Any) -> bool:
        return any(self.stored(module, projection).packed for projection in self.weights(module))

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        return {
            projection: ProjectionShape(*self.stored(module, projection).shape[1:])
            for projection in self.weights(module)
        }

    def obstacle(self, module: Any, *, on_meta: bool = False) -> str | None:
        if (reason := self.unfit(module)) is not None:
            return f"its weight {reason}"
        for name, where in self.weights(module).items():
            holder = module.get_submodule(where.module)
            if (reason := self._unreadable(holder, where, on_meta)) is not None:
                return f"its {name} {reason}"
        counts = [self.stored(module, projection).shape[0] for projection in self.weights(module)]
        if len(set(counts)) > 1:
            return f"its projections have {' and '.join(map(str, counts))} experts"
        return None

    def _unreadable(self, holder: Any, where: ExpertParameter, on_meta: bool) -> str | None:
        """Say why a weight cannot be read, packed or not."""
        if (reason := holders.converted(holder, where.name)) is not None:
            return reason
        packed = holders.open_weight(holder, where.name, where.transposed)
        weight = getattr(holder, where.name, None) if packed is None else packed.tensors[0]
        if not isinstance(weight, Tensor) or (packed is None and weight.dim() != self.dims):
            return f"is not a {self.dims}-D tensor"
        if weight.is_meta and not on_meta:
            return ON_META
        return unreadable(holder, where.name) if packed is None else None

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
        layer = weakref.ref(module)
        lora.base = lambda projection: self.stored(layer(), projection)
        return self.install_into(self, module, lora, observer)

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        stored = self.stored(module, projection)
        if isinstance(stored, Dense):
            return stored.view(expert)
        whole = dataclasses.replace(stored, tensors=tuple(map(parts.whole, stored.tensors)))
        return whole.matrix(expert, stored.dtype or torch.float32).T

    def location(self, module: Any, projection: str) -> ExpertParameter:
        return self.weights(module)[projection]

    def projector(self, module: Any, lora: ExpertLoRA | None, dispatch: Dispatch) -> Project:
        """Return the function that multiplies sorted rows with a projection of their experts."""

        def project(
            projection: str, inputs: Tensor, bias: Tensor | None = None, **options: Any
        ) -> Tensor:
            if torch.compiler.is_compiling():
                assert lora is not None, "only experts with LoRA are part of a graph"
                rows = inputs.to(self._compiled_dtype(module, projection, inputs))
                return lora.compiled(projection, rows, bias, dispatch, **options)
            weight = self.stored(module, projection)
            factors = None if lora is None else lora.factors(projection)
            rows = inputs.to(compute_dtype(weight, inputs))
            return expert_linear(rows, weight, bias, factors, dispatch, **options)

        return project

    def _compiled_dtype(self, module: Any, projection: str, inputs: Tensor) -> torch.dtype:
        """What :func:`compute_dtype` returns, as ``torch.compile`` can follow it."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        where = self.weights(module)[projection]
        weight = getattr(module.get_submodule(where.module), where.name)
        found: torch.dtype = weight.dtype
        return found if found.is_floating_point and found.itemsize > 1 else inputs.dtype


def is_a(class_name: str) -> Callable[[nn.Module], bool]:
    """Return the test for modules of a class, given by its dotted name, or of a subclass."""
    return lambda module: class_name in map(dotted_name, type(module).__mro__)


def routed(run: Run) -> Install:
    """Adapt experts that are called as ``experts(hidden_states, top_k_index, top_k_weights)``."""

    def install(convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
        def forward(own: Forward, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if lora.is_idle:
                output = lora.tie(own(states, index, weights))
            else:
                output = _routed(convention, run, module, lora, states, index, weights)
            return observer.routed(lora, output, index, weights)

        return undo_all(give_lora(module, lora, observer), run_instead(module, forward, observer))

    return install


def packed_routed(convention: Callable[[], Fused], run: Run) -> Packed:
    """Run such experts where their weights are packed."""

    def forward(module: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return _routed(convention(), run, module, None, states, index, weights)

    return packed_by_class({"": forward})


def _routed(
    convention: Fused,
    run: Run,
    module: Any,
    lora: ExpertLoRA | None,
    states: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    tokens = states.reshape(-1, states.shape[-1])
    project = convention.projector(
        module, lora, Dispatch.sort(index, convention.num_experts(module))
    )
    output = run(module, project, tokens, index, weights)
    return output.to(states.dtype).view(states.shape)


def multiply_packed(
    holder: Any, where: ExpertParameter, inputs: Tensor, dispatch: Dispatch
) -> Tensor:
    """Sorted rows [S, I] times the packed weights that a module holds, [S, O]."""
    weight = holders.open_weight(holder, where.name, where.transposed)
    assert weight is not None, "a module gets its packed weights and this forward together"
    rows = inputs.to(compute_dtype(weight, inputs))
    return expert_linear(rows, weight, None, None, dispatch)


def packed_by_class(forwards: Mapping[str, Callable[..., Tensor]]) -> Packed:
    """Give some modules of a layer, by name, a class whose forward reads packed weights.

    It has the name of their own class, and a copy of the model has it too.
    """

    def start(layer: Any) -> None:
        for name, forward in forwards.items():
            module = layer.get_submodule(name)
            kind: Any = type(module)
            module.__class__ = _subclass(kind, forward)

    def stop(layer: Any) -> None:
        for name in forwards:
            module = layer.get_submodule(name)
            module.__class__ = type(module).__base__

    return Packed(start, stop)


@functools.cache
def _subclass(kind: type, forward: Callable[..., Tensor]) -> type:
    forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    own = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), own)


def compute_dtype(weight: Stored, inputs: Tensor) -> torch.dtype:
    """Return the autocast dtype inside autocast, else that of the base weights."""
    kind = weight.device.type
    try:
        autocast = torch.is_autocast_enabled(kind)
    except RuntimeError as error:  # a device without data has none
        raise ModelError(
            f"the adapted experts are on the device {kind!r}, which holds no values; load the "
            "model again, then drlora_torch.load(model, path) or attach"
        ) from error
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype or inputs.dtype


def run_instead(module: nn.Module, adapted: Callable[..., Tensor], observer: Observer) -> Undo:
    """Run ``adapted`` in place of the forward of a module, which it gets before the inputs.

    Accelerate, which moves inputs to the device of a module, keeps the module's own forward under
    another name: that one is replaced then, so that inputs are still moved.
    """
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"
    own = getattr(module, place)
    inherited = place not in vars(module)
    # It loops over experts and observes: a compiled model leaves its graph here.
    adapted = torch.compiler.disable(adapted)  # type: ignore[no-untyped-call]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return adapted(own, *args, **kwargs) if observer.enabled else own(*args, **kwargs)

    vars(module)[place] = forward

    def remove() -> None:
        del vars(module)[place]
        if not inherited:
            vars(module)[place] = own

    return remove
