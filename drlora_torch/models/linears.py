"""Blocks whose experts are small modules of Linears, in a ModuleList or ModuleDict: as declared.

The block's own code runs, loop over experts included. A forward hook on each adapted Linear adds
s (x A^T) B, so the Linears may be quantised: their product is their own business. No module is
replaced and no parameter renamed.

What a declaration says is checked at every forward against what the Linears saw, so that neither
a wrong routing nor an expert that never got its LoRA goes unnoticed.

Shape letters: T tokens, K experts per token, N experts, I input and O output features, r rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drlora_torch.errors import ModelError
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.convention import Observer
from drlora_torch.models.fused import all_of, give_lora

if TYPE_CHECKING:
    from drlora_torch.models.declaration import Declaration

Factors = tuple[Tensor, Tensor]
"""A [r, I] and B [r, O] of one expert, as views of one gather."""


@dataclasses.dataclass(slots=True, eq=False)
class _Call:
    """One forward of the block, from its start to its end."""

    routing: tuple[Tensor, Tensor] | None = None
    factors: dict[str, list[Factors]] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Rows that the Linear of each expert has seen, by projection."""


class BlockHooks:
    """The hooks of one adapted block; ``handles`` take them out."""

    def __init__(
        self, declaration: Declaration, block: nn.Module, lora: ExpertLoRA, observer: Observer
    ) -> None:
        self.declaration = declaration
        self.lora = lora
        self.observer = observer
        self.calls: list[_Call] = []
        self.handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            block.register_forward_hook(self._check),
            block.register_forward_hook(self._leave, always_call=True),
        ]
        if declaration.router is not None:
            router = block.get_submodule(declaration.router)
            routed = self._routed_by(block)
            self.handles.append(router.register_forward_hook(routed))
        for projection, _ in lora.items():
            for expert, linear in enumerate(declaration.linears(block, projection)):
                hook = self._adding(projection, expert)
                self.handles.append(linear.register_forward_hook(hook))

    # -- around the block ----------------------------------------------------------------------

    def _enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call()
        self.calls.append(call)
        if not self.observer.enabled:
            return
        for projection, _ in self.lora.items():
            call.factors[projection] = _split(self.lora, projection)
            call.rows[projection] = [0] * self.lora.table.num_experts
        if self.declaration.router is None:
            self._take(call, self.declaration.routing(block, *args, **kwargs))

    def _leave(self, block: Any, args: object, output: object) -> None:
        if self.calls:
            self.calls.pop()

    def _routed_by(self, block: Any) -> Callable[..., None]:
        def routed(router: Any, args: object, output: Any) -> None:
            if self.observer.enabled and self.calls:
                self._take(self.calls[-1], self.declaration.routing(block, output))

        return routed

    @torch.no_grad()
    def _take(self, call: _Call, routing: object) -> None:
        index, weights = _checked(routing, self.lora.name)
        call.routing = index, weights
        self.observer.routed(self.lora.name, index, weights)

    # -- at a Linear ---------------------------------------------------------------------------

    def _adding(self, projection: str, expert: int) -> Callable[..., Tensor | None]:
        def add(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.observer.enabled:
                return None
            if not self.calls:
                lora_A, lora_B = _split(self.lora, projection)[expert]
            else:
                call = self.calls[-1]
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

    # -- what must hold ------------------------------------------------------------------------

    def _check(self, block: Any, args: object, output: object) -> None:
        """Each expert's Linears saw the tokens that the declared routing sends there, or all."""
        if not self.observer.enabled or not self.calls:
            return
        call, name = self.calls[-1], self.lora.name
        if call.routing is None:
            raise ModelError(
                f"layer {name!r}: its router {self.declaration.router!r} was not called in the "
                "forward of the block, so nothing is known of the routing; see register_moe"
            )
        index, _ = call.routing
        num_experts = self.lora.table.num_experts
        clamped = index.clamp(max=num_experts).reshape(-1)
        wanted = torch.bincount(clamped, minlength=num_experts + 1).tolist()[:num_experts]
        for projection, rows in call.rows.items():
            for expert, (seen, due) in enumerate(zip(rows, wanted, strict=True)):
                if due and seen not in (due, index.shape[0]):
                    raise ModelError(
                        f"layer {name!r}: by the declared routing expert {expert} gets {due} of "
                        f"{index.shape[0]} tokens, but its {projection} was called with {seen}; "
                        "correct what register_moe was given for "
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


def _checked(routing: object, name: str) -> tuple[Tensor, Tensor]:
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
        f"layer {name!r}: the routing function given to register_moe must return (index, weights) "
        "of shape [tokens, experts per token], integers and numbers"
    )


def install(
    declaration: Declaration, block: nn.Module, lora: ExpertLoRA, observer: Observer
) -> Callable[[], None]:
    """Give a block its LoRA and the hooks; return the function that takes them back out."""
    removals = [give_lora(block, lora, observer)]
    hooks = BlockHooks(declaration, block, lora, observer)
    removals += [handle.remove for handle in hooks.handles]
    return all_of(removals)
