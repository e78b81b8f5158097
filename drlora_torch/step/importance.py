"""Importance of rank dimensions, read from the LoRA gradients (AdaLoRA, arXiv 2303.10512, eq. 8).

Shape letters: P rank slots, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drlora_core.errors import StatisticError
from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA, SlotLoRA
from drlora_torch.lora.triton_use import runs_triton
from drlora_torch.signals import SENSITIVITY, Importance, ProjectionRows

CHUNK_BYTES = 2**26
"""Most bytes of products at one time: they keep any device busy, and are little beside the LoRA of
a large model and its gradients."""


@torch.no_grad()
def mean_sensitivity(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """mean |w * dL/dw| of every row of each parameter, [P, I] or [P, O] -> float64 [P].

    Computed in float32 at least: in float16 small products would underflow.
    """
    if parameters and all(map(runs_triton, parameters)):
        from drlora_torch.step import importance_on_gpu

        pairs = zip(parameters, gradients, strict=True)
        return [importance_on_gpu.mean_sensitivity(w, g.contiguous()) for w, g in pairs]
    found: list[Tensor] = []
    for chunk in _chunks(parameters):
        weights = [_widen(parameters[i]) for i in chunk]
        products = torch._foreach_mul(weights, [_widen(gradients[i]) for i in chunk])
        # abs and mean use vector instructions, which linalg.vector_norm(ord=1) does not
        torch._foreach_abs_(products)
        means = torch.cat([product.mean(dim=1) for product in products]).double()
        found += torch.split(means, [len(product) for product in products])
    return found


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of neighbors on one device, with products of ``CHUNK_BYTES`` or of one parameter."""
    chunk: list[int] = []
    size = 0
    for place, parameter in enumerate(parameters):
        own = parameter.numel() * _wide(parameter).itemsize
        device = parameter.device
        if chunk and (size + own > CHUNK_BYTES or device != parameters[chunk[0]].device):
            yield chunk
            chunk, size = [], 0
        chunk.append(place)
        size += own
    if chunk:
        yield chunk


def _wide(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype.itemsize >= 4 else torch.float32


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor))


def slot_importance(
    loras: Iterable[ExpertLoRA], signal: Importance = SENSITIVITY, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """s_j of every slot, by an importance signal, summed over the projections.

    Args:
        loras: of the layers.
        signal: by default mean |A_j * dA_j| + mean |B_j * dB_j|.
        scale: what the gradients are multiplied with, [] on any device; None: 1.

    Returns:
        By layer, float64 [P] on the device of its parameters. A parameter without a gradient
        (nothing was routed there) counts as one of 0, and rows that other processes hold add 0.
    """
    wide = None if scale is None else scale.double()
    if not signal.is_sensitivity:
        return {lora.name: _measure_layer(lora, signal, wide) for lora in loras}
    slots = _slot_sensitivity(loras)
    if wide is not None:
        slots = {name: values / wide.to(values.device) for name, values in slots.items()}
    return slots


def _measure_layer(lora: ExpertLoRA, signal: Importance, scale: Tensor | None) -> Tensor:
    measured = [_measure(slots, signal, scale) for _, slots in lora.items()]
    return torch.stack(measured).sum(0)


@torch.no_grad()
def _measure(slots: SlotLoRA, signal: Importance, scale: Tensor | None = None) -> Tensor:
    """An importance signal of the rows of one projection that are here, in their places, [P]."""
    gradients = []
    for parameter in (slots.lora_A, slots.lora_B):
        gradient = parameter.grad
        if gradient is None:
            gradients.append(torch.zeros_like(_widen(parts.local(parameter))))
        else:
            wide = _widen(parts.local(gradient))
            gradients.append(wide if scale is None else wide / scale.to(wide))
    weights = [_widen(parts.local(parameter)) for parameter in (slots.lora_A, slots.lora_B)]
    values = signal.measure(ProjectionRows(*weights, *gradients))
    return parts.spread_out(slots.lora_A, values)


def _slot_sensitivity(loras: Iterable[ExpertLoRA]) -> dict[str, Tensor]:
    """Sensitivity of every slot, for many parameters at once."""
    terms: dict[str, list[Tensor]] = {}
    held: list[tuple[str, nn.Parameter]] = []
    for lora in loras:
        own = [p for p in lora.tensors().values() if p.grad is not None]
        held += [(lora.name, parameter) for parameter in own]
        terms[lora.name] = [] if own else [_zeros(lora)]
    for (name, _), values in zip(held, _row_importance([p for _, p in held]), strict=True):
        terms[name].append(values)
    for place in range(1, max(map(len, terms.values()), default=0)):
        sums = [each[0] for each in terms.values() if len(each) > place]
        torch._foreach_add_(sums, [each[place] for each in terms.values() if len(each) > place])
    return {name: each[0] for name, each in terms.items()}


def _row_importance(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The importance of the rows that are here, in their places, float64 [P] each."""
    weights = [parts.local(parameter) for parameter in parameters]
    gradients = [parts.local(p.grad) for p in parameters if p.grad is not None]
    return [
        parts.spread_out(parameter, here)
        for parameter, here in zip(parameters, mean_sensitivity(weights, gradients), strict=True)
    ]


class ImportanceReader:
    """Reads importance as gradients arrive, where no torch optimizer steps (``auto_step=False``).

    Autograd's accumulation hooks see the gradient summed over the micro-batches so far, so the
    last value of a step is that of its whole gradient, and it survives ``zero_grad``. With several
    processes :meth:`read` follows at the end of the backward pass, when gradients are averaged.
    """

    def __init__(self, loras: Iterable[ExpertLoRA], signal: Importance = SENSITIVITY) -> None:
        self.parts: dict[str, Tensor] = {}
        """What was read since the last :meth:`take`, float64 [P] by parameter; with a signal that
        takes A and B together, by A."""
        self._signal = signal
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, lora, key))  # type: ignore[no-untyped-call]
            for lora in loras
            for key, parameter in lora.tensors().items()
        ]

    def take(self, loras: Iterable[ExpertLoRA], grad_scale: float) -> dict[str, Tensor]:
        """Importance of the slots [P] of every layer, for the unscaled gradients; starts anew."""
        divisor = 1.0 if grad_scale == 1.0 else grad_scale ** self._degree()
        taken = {}
        for lora in loras:
            read = [self.parts[key] for key in lora.tensors() if key in self.parts]
            taken[lora.name] = torch.stack(read).sum(0) / divisor if read else _zeros(lora)
        self.parts.clear()
        return taken

    def read(self, lora: ExpertLoRA) -> None:
        """Read the gradients of a layer as they are now."""
        for key, parameter in lora.tensors().items():
            self._arrived(lora, key, parameter)

    def keep(self, wanted: Tensor) -> None:
        """Set what was read to zero unless a device says that it is wanted, bool []."""
        self.parts = {key: keep_if(wanted, values) for key, values in self.parts.items()}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _degree(self) -> int:
        """How importance grows with the gradients, which were read while they were scaled."""
        if (degree := self._signal.degree) is None:
            name = self._signal.name
            raise StatisticError(
                f"grad_scale needs to know how the importance signal {name!r} grows with the "
                f"gradients: set {name}.degree = 1 (like them), 2 (like their squares) or 0"
            )
        return degree

    def _arrived(self, lora: ExpertLoRA, key: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if self._signal.is_sensitivity:
            self.parts[key] = _row_importance([parameter])[0]
            return
        # The last of the two gradients to arrive finds the other.
        layer_and_projection = key.rpartition("/")[0]
        slots = dict(lora.items())[layer_and_projection.removeprefix(f"{lora.name}/")]
        self.parts[f"{layer_and_projection}/lora_A"] = _measure(slots, self._signal)


def keep_if(wanted: Tensor, values: Tensor) -> Tensor:
    """The values, or zeros; the device decides. They may be NaN, so this is no product."""
    return torch.where(wanted.to(values.device), values, 0.0)


def _zeros(lora: ExpertLoRA) -> Tensor:
    return torch.zeros(lora.table.num_slots, dtype=torch.float64, device=lora.device)
