"""The gradient of every expert's own weights, by its norm, while the weights stay frozen.

Autograd makes the gradient of one parameter at a time; it is measured and dropped as it arrives,
so that one of the largest is the memory that this takes.

Shape letters: N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.attached import AdaptedLayer
from drlora_torch.errors import ModelError
from drlora_torch.lora import parts
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter


class WeightGradients:
    """Measures what backward passes give to the experts of some layers, inside ``with``.

    What the parameters had before, ``requires_grad`` and gradients, is theirs again afterwards.

    Args:
        layers: by name.

    Raises:
        ModelError: weights that are packed, or spread over processes, have no gradients here.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer]) -> None:
        self.squares: dict[str, Tensor] = {}
        """Sum of the squares of each expert's gradients, float64 [N] by layer."""
        self._undo: list[Callable[[], object]] = []
        self._found: list[tuple[str, nn.Parameter, int | None]] = []
        for name, layer in layers.items():
            if convention_of(layer.experts).is_packed(layer.experts):
                raise ModelError(f"layer {name!r} is packed ({layer.record.dtype}): {REASON}")
            for projection in layer.record.projections:
                self._found += _parameters(name, layer, projection)
        self._sizes = {name: layer.record.num_experts for name, layer in layers.items()}

    def __enter__(self) -> WeightGradients:
        for name, parameter, expert in self._found:
            before = parameter.requires_grad, parameter.grad
            parameter.grad = None
            parameter.requires_grad_(True)
            arrived = partial(self._arrived, name, expert)
            handle = parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            self._undo.append(partial(_give_back, parameter, *before, handle.remove))
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def take(self) -> dict[str, Tensor]:
        """Norm of each expert's gradient since the last call, float64 [N] on the CPU, by layer."""
        squares, self.squares = self.squares, {}
        none = torch.zeros(1, dtype=torch.float64)
        return {
            name: squares.get(name, none.expand(size)).sqrt().cpu()
            for name, size in self._sizes.items()
        }

    @torch.no_grad()
    def _arrived(self, name: str, expert: int | None, parameter: Tensor) -> None:
        if parameter.grad is None:
            raise ModelError(
                f"layer {name!r}: the gradient of its weights was taken before it could be "
                "measured, by a hook of yours or since two layers share them; use "
                "importance='gradient'"
            )
        sums = self.squares.get(name)
        if sums is None:
            sums = parameter.new_zeros(self._sizes[name], dtype=torch.float64)
            self.squares[name] = sums
        chosen = slice(None) if expert is None else slice(expert, expert + 1)
        rows = parameter.grad.reshape(sums[chosen].numel(), -1)
        # in float32 at least: squares of float16 gradients would be 0
        sums[chosen] += torch.stack([row.float().square().sum().double() for row in rows])
        parameter.grad = None


REASON = (
    "only weights in a floating-point dtype, whole in this process, have gradients of their own"
)


def _parameters(
    name: str, layer: AdaptedLayer, projection: str
) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """The parameters of a projection, and the expert of each; None for all in one."""
    where = convention_of(layer.experts).location(layer.experts, projection)
    found: list[tuple[nn.Module, str, int | None]]
    if isinstance(where, ExpertParameter):
        found = [(layer.experts.get_submodule(where.module), where.name, None)]
    else:
        linears = (f"{each}.{where.projection}" for each in where.experts)
        found = [
            (layer.experts.get_submodule(each), "weight", expert)
            for expert, each in enumerate(linears)
        ]
    for module, attribute, expert in found:
        parameter: Any = getattr(module, attribute)
        if parts.is_sharded(parameter) or not parameter.is_floating_point():
            raise ModelError(f"layer {name!r} is spread over processes, or packed: {REASON}")
        yield name, parameter, expert


def _give_back(
    parameter: nn.Parameter,
    requires_grad: bool,
    gradient: Tensor | None,
    remove: Callable[[], object],
) -> None:
    remove()
    parameter.requires_grad_(requires_grad)
    parameter.grad = gradient
