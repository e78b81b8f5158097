"""Hooks of a block whose experts are small modules of Linears, in a ModuleList or ModuleDict.

The block's own code runs, its loop over experts included. A forward hook on each adapted Linear
adds s (x A^T) B to its output, so the Linears may be quantised. No module is replaced and no
parameter renamed.

At every forward the declaration is checked against what the Linears saw, so that neither a wrong
routing nor an expert without its LoRA goes unnoticed.

Shape letters: T tokens, K experts per token, N experts, I input and O output features, r rank.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.errors import ModelError, refuse_copy
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.convention import Observer, give_lora, undo_all
from drlora_torch.models.declaration import Declaration

Factors = tuple[Tensor, Tensor]
"""A [r, I] and B [r, O] of one expert, as views of one gather."""


@dataclasses.dataclass(slots=True, eq=False)
class _Call:
    """One forward of the block."""

    routing: tuple[Tensor, Tensor] | None = None
    factors: dict[str, list[Factors]] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Rows that the Linear of each expert has seen, by projection."""


def install(
    declaration: Declaration, block: nn.Module, lora: ExpertLoRA, observer: Observer
) -> Callable[[], None]:
    """Give a block its LoRA and the hooks; return the function that takes them back out."""
    remove_lora = give_lora(block, lora, observer)
    hooks = BlockHooks(declaration, block, lora, observer)
    return undo_all([remove_lora, *(handle.remove for handle in hooks.handles)])


class BlockHooks:
    """The hooks of one adapted block; ``handles`` take them out."""

    __reduce__ = refuse_copy

    def __init__(
        self, declaration: Declaration, block: nn.Module, lora: ExpertLoRA, observer: Observer
    ) -> None:
        self.declaration = declaration
        self.lora = lora
        self.observer = observer
        self._running = threading.local()  # the call of each thread
        self.handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            block.register_forward_hook(torch.compiler.disable(self._finish)),  # type: ignore[no-untyped-call]
            block.register_forward_hook(self._leave, always_call=True),
        ]
        if declaration.router is not None:
            router = block.get_submodule(declaration.router)
            self.handles.append(router.register_forward_hook(self._routed_by(block)))
        for projection, _ in lora.items():
            for expert, linear in enumerate(declaration.linears(block, projection)):
                hook = self._adding(projection, expert)
                self.handles.append(linear.register_forward_hook(hook))

    @property
    def _call(self) -> _Call | None:
        call: _Call | None = getattr(self._running, "call", None)
        return call

    # -- around the block ----------------------------------------------------------------------

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.call = None  # of a forward that was interrupted
        if not self.observer.enabled:
            return
        call = _Call()
        for projection, _ in self.lora.items():
            call.factors[projection] = _split(self.lora, projection)
            call.rows[projection] = [0] * self.lora.table.num_experts
        if self.declaration.router is None:
            call.routing = _checked(self.declaration.routing(block, *args, **kwargs), self.lora)
        self._running.call = call

    def _routed_by(self, block: Any) -> Callable[..., None]:
        @torch.no_grad()
        def routed(router: Any, args: object, output: Any) -> None:
            if self._call is not None:
                self._call.routing = _checked(self.declaration.routing(block, output), self.lora)

        return routed

    def _finish(self, block: Any, args: object, output: object) -> None:
        """Check the declaration, and observe the routing."""
        if (call := self._call) is None:
            return
        if call.routing is None:
            raise ModelError(
                f"layer {self.lora.name!r}: its router {self.declaration.router!r} was not called "
                "in the forward of the block, so nothing is known of the routing; see register_moe"
            )
        self._check_rows(call, call.routing[0])
        self.observer.routed(self.lora, _first_tensor(output), *call.routing)

    def _leave(self, block: Any, args: object, output: object) -> None:
        self._running.call = None

    # -- at a Linear ---------------------------------------------------------------------------

    def _adding(self, projection: str, expert: int) -> Callable[..., Tensor | None]:
        def add(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.observer.enabled:
                return None
            if (call := self._call) is None:
                lora_A, lora_B = _split(self.lora, projection)[expert]
            else:
                call.rows[projection][expert] += args[0].numel() // args[0].shape[-1]
                lora_A, lora_B = call.factors[projection][expert]
            if not lora_A.shape[0]:
                return None
            return self._added(output, args[0], lora_A, lora_B)

        return torch.compiler.disable(add)  # type: ignore[no-any-return, no-untyped-call]

    def _added(self, output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        p = self.lora.dropout if self.lora.training else 0.0
        low = nn.functional.dropout(x, p).to(lora_A.dtype) @ lora_A.T
        if output.dim() == 2 and output.dtype == low.dtype == lora_B.dtype:
            return torch.addmm(output, low, lora_B, alpha=self.lora.scaling)
        return output + (self.lora.scaling * low @ lora_B).to(output.dtype)

    def _check_rows(self, call: _Call, index: Tensor) -> None:
        """Each expert's Linears saw the tokens that the declared routing sends there, or all."""
        num_experts = self.lora.table.num_experts
        clamped = index.clamp(max=num_experts).reshape(-1)
        wanted = torch.bincount(clamped, minlength=num_experts + 1).tolist()[:num_experts]
        for projection, rows in call.rows.items():
            for expert, (seen, due) in enumerate(zip(rows, wanted, strict=True)):
                if due and seen not in (due, index.shape[0]):
                    raise ModelError(
                        f"layer {self.lora.name!r}: by the declared routing expert {expert} gets "
                        f"{due} of {index.shape[0]} tokens, but its {projection} was called with "
                        f"{seen}; correct the arguments of register_moe for "
                        f"{self.declaration.block_name}"
                    )


def _split(lora: ExpertLoRA, projection: str) -> list[Factors]:
    """A and B by expert: one gather and one split, whose backward is one scatter."""
    factors = lora.factors(projection)
    assert factors is not None
    table = lora.table
    active = torch.from_numpy(table.active()).to(factors.lora_A.device)
    ranks = table.ranks().tolist()
    lora_A = torch.split(factors.lora_A[active], ranks)
    lora_B = torch.split(factors.lora_B[active], ranks)
    return list(zip(lora_A, lora_B, strict=True))


def _checked(routing: object, lora: ExpertLoRA) -> tuple[Tensor, Tensor]:
    if isinstance(routing, tuple) and len(routing) == 2:
        index, weights = routing
        if (
            isinstance(index, Tensor)
            and isinstance(weights, Tensor)
            and index.dim() == 2
            and index.shape == weights.shape
            and not index.is_floating_point()
        ):
            return index, weights.detach()
    raise ModelError(
        f"layer {lora.name!r}: the routing function given to register_moe must return (index, "
        "weights) of shape [tokens, experts per token], integers and numbers"
    )


def _first_tensor(output: object) -> Tensor:
    """The hidden states that a block returns, alone or first among other values."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    values: Iterable[object] = output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ModelError(
        f"a declared block returned {type(output).__name__}, which holds no tensor to observe; "
        "accepted: a tensor, or a tuple, list or dict with the hidden states first"
    )
