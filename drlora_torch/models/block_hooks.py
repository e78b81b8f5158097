"""Hooks of a block whose experts are small modules of Linears, in a ModuleList or ModuleDict.

The block's own code runs, its loop over experts included. A forward hook on each adapted Linear
adds s (x A^T) B to its output, so the Linears may be quantized. No module is replaced and no
parameter renamed.

Every forward checks the declaration against the calls of the Linears, so that neither a wrong
routing nor an expert without its LoRA goes unnoticed.

Shape letters: T tokens, K experts per token, N experts, I input and O output features, r rank.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drlora_torch.errors import ModelError, refuse_copy
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.convention import Observer

Factors = tuple[Tensor, Tensor]
"""A [r, I] and B [r, O] of one expert, as views of one gather."""


@dataclasses.dataclass(slots=True, eq=False)
class _Call:
    """One forward of the block."""

    factors: dict[str, list[Factors]]
    rows: dict[str, list[int]]
    """Rows that the Linear of each expert has seen, by projection."""
    routing: tuple[Tensor, Tensor] | None = None


class _Running(threading.local):
    """The forward that each thread is in."""

    call: _Call | None = None


@dataclasses.dataclass(eq=False)
class BlockHooks:
    """The hooks of one adapted block; ``router`` and ``routing`` as ``register_moe`` was told."""

    router: str | None
    routing: Callable[..., object]
    lora: ExpertLoRA
    observer: Observer
    _running: _Running = dataclasses.field(default_factory=_Running, init=False)

    __reduce__ = refuse_copy

    def register(
        self, block: nn.Module, linears: Mapping[str, Sequence[nn.Module]]
    ) -> list[RemovableHandle]:
        """Register all hooks; their handles take them out."""
        handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            block.register_forward_hook(self._finish),
            block.register_forward_hook(self._leave, always_call=True),
        ]
        if self.router is not None:
            hook = partial(self._remember, block)
            handles.append(block.get_submodule(self.router).register_forward_hook(hook))
        for projection, _ in self.lora.items():
            for expert, linear in enumerate(linears[projection]):
                hook = partial(self._add, projection, expert)
                handles.append(linear.register_forward_hook(hook))
        return handles

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.call = None  # of a forward that was interrupted
        if not self.observer.enabled:
            return
        names = [projection for projection, _ in self.lora.items()]
        call = _Call(
            factors={name: _split(self.lora, name) for name in names},
            rows={name: [0] * self.lora.table.num_experts for name in names},
        )
        if self.router is None:
            call.routing = self._routing(block, *args, **kwargs)
        self._running.call = call

    @torch.no_grad()
    def _remember(self, block: Any, router: Any, args: object, output: Any) -> None:
        if (call := self._running.call) is not None:
            call.routing = self._routing(block, output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, block: Any, args: object, output: object) -> object:
        if (call := self._running.call) is None:
            return output
        if call.routing is None:
            raise ModelError(
                f"layer {self.lora.name!r}: its router {self.router!r} was not called "
                "in the forward of its block; see register_moe"
            )
        self._send_rows(type(block).__name__, call, call.routing[0])
        place, hidden = _first_tensor(output)
        if not self.lora.table.ranks().all():  # experts without rank may be all that was used
            hidden = self.lora.tie(hidden)
            output = _put(output, place, hidden)
        self.observer.routed(self.lora, hidden, *call.routing)
        return output

    def _leave(self, block: Any, args: object, output: object) -> None:
        self._running.call = None

    def _routing(self, block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = self.routing(block, *args, **kwargs)
        if (
            isinstance(found, tuple)
            and len(found) == 2
            and all(isinstance(each, Tensor) and each.dim() == 2 for each in found)
            and found[0].shape == found[1].shape
            and not found[0].is_floating_point()
        ):
            return found[0], found[1].detach()
        raise ModelError(
            f"layer {self.lora.name!r}: the routing function given to register_moe must return "
            "(index, weights) of shape [tokens, experts per token], integers and numbers"
        )

    def _send_rows(self, block: str, call: _Call, index: Tensor) -> None:
        """Have the rows of each expert by the declared routing compared with those of its Linears.

        How many rows a Linear has seen is known here, so only the routing comes from the device.
        """
        num_experts = self.lora.table.num_experts
        clamped = index.clamp(max=num_experts).reshape(-1)
        # scatter_add_ does not wait for the device, as bincount does to know the largest index
        wanted = torch.zeros(num_experts + 1, dtype=torch.float64, device=index.device)
        wanted.scatter_add_(0, clamped.long(), wanted.new_ones(()).expand(clamped.shape))
        check = partial(_check_rows, f"layer {self.lora.name!r}", block, call.rows, index.shape[0])
        self.observer.look_at(wanted, check)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(
        self, projection: str, expert: int, linear: Any, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if not self.observer.enabled:
            return None
        x, lora = args[0], self.lora
        if (call := self._running.call) is None:
            lora_A, lora_B = _split(lora, projection)[expert]
        else:
            call.rows[projection][expert] += x.numel() // x.shape[-1]
            lora_A, lora_B = call.factors[projection][expert]
        if not lora_A.shape[0]:
            return None
        x = nn.functional.dropout(x, lora.dropout if lora.training else 0.0)
        low = x.to(lora_A.dtype) @ lora_A.T
        if output.dim() == 2 and output.dtype == low.dtype == lora_B.dtype:
            return torch.addmm(output, low, lora_B, alpha=lora.scaling)
        return output + (lora.scaling * low @ lora_B).to(output.dtype)


def _split(lora: ExpertLoRA, projection: str) -> list[Factors]:
    """A and B by expert: one gather and one split, whose backward is one scatter."""
    factors = lora.factors(projection)
    assert factors is not None
    active = lora.active_slots(factors.lora_A.device)
    ranks = lora.table.ranks().tolist()
    A, B = (torch.split(each[active], ranks) for each in (factors.lora_A, factors.lora_B))
    return list(zip(A, B, strict=True))


def _check_rows(
    layer: str,
    block: str,
    rows: Mapping[str, Sequence[int]],
    num_tokens: int,
    wanted: NDArray[np.float64],
) -> None:
    """An expert's Linears must see the tokens that the declared routing sends there, or all."""
    for projection, each in rows.items():
        for expert, (seen, due) in enumerate(zip(each, wanted[:-1].tolist(), strict=True)):
            if due and seen not in (due, num_tokens):
                raise ModelError(
                    f"{layer}: by the declared routing expert {expert} gets {due:.0f} of "
                    f"{num_tokens} tokens, but its {projection} was called with {seen}; correct "
                    f"register_moe for {block}"
                )


def _first_tensor(output: object) -> tuple[Any, Tensor]:
    """The hidden states that a block returns, alone or first among other values, and their key."""
    pairs: Iterable[tuple[Any, object]] = [(None, output)]
    if isinstance(output, dict):
        pairs = output.items()
    elif isinstance(output, (tuple, list)):
        pairs = enumerate(output)
    for key, value in pairs:
        if isinstance(value, Tensor):
            return key, value
    raise ModelError(
        f"a declared block returned {type(output).__name__}; accepted: a tensor, or a tuple, list "
        "or dict with the hidden states first"
    )


def _put(output: Any, key: Any, hidden: Tensor) -> object:
    """What a block returns, with other hidden states at a key of :func:`_first_tensor`."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        values = (*output[:key], hidden, *output[key + 1 :])
        return output._make(values) if hasattr(output, "_make") else values
    output[key] = hidden
    return output
