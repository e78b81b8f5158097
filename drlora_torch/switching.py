"""How an adapter comes into a model, becomes the active one, rests, and goes.

``put_in`` and ``take_out`` put its LoRA into the model and out again; in between, ``start`` and
``stop`` make it the active one and let it rest. Both pairs are called by ``NamedAdapters`` alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch import pending
from drlora_torch.errors import AttachError
from drlora_torch.following import OptimizerFollower
from drlora_torch.importance import AccumulatedImportance
from drlora_torch.models.convention import child_name
from drlora_torch.models.conventions import convention_of
from drlora_torch.routing import ForwardWatch

if TYPE_CHECKING:
    from drlora_torch.adapter import AdaptedLayer, Adapter
    from drlora_torch.named import NamedAdapters


class Switchable:
    """The part of an :class:`drlora_torch.Adapter` that can be switched; no other class has it."""

    name: str
    layers: dict[str, AdaptedLayer]
    named: NamedAdapters
    watch: ForwardWatch

    def __init__(self) -> None:
        self.accumulated: AccumulatedImportance | None = None
        self.unfinished: dict[str, Tensor] = {}  # of a step, while resting
        self._undo: list[Callable[[], None]] = []
        self._while_active: list[Callable[[], None]] = []
        self._routers_in = False
        self._other_routers: dict[str, Tensor] = {}  # base values, or trained ones while out

    # -- what a user calls ---------------------------------------------------------------------

    @property
    def is_active(self: Adapter) -> bool:  # type: ignore[misc]
        """True for the adapter that the model runs with; always, if it is the only one."""
        return bool(self.layers) and self.named.active is self

    def activate(self: Adapter) -> None:  # type: ignore[misc]
        """Make this the adapter that the model runs with and that trains; the others rest.

        Trained routers are exchanged too. What an unfinished step has gathered, gradients
        included, is put aside and comes back with its adapter.

        Raises:
            AttachError: the adapter was detached, or the active one is disabled.
        """
        self.check_attached()
        self.named.activate(self)

    def detach(self: Adapter) -> nn.Module:  # type: ignore[misc]
        """Take the adapter out; without any, the model is as before ``attach``, bit for bit.

        If it was active, the last of the others to be attached is active now.
        """
        self.check_attached()
        self.named.remove(self)
        self.layers = {}
        return self.model

    def check_active(self: Adapter) -> None:  # type: ignore[misc]
        """Refuse what only the active adapter can do."""
        self.check_attached()
        if not self.is_active:
            active = self.named.active
            raise AttachError(
                f"adapter {self.name!r} is not active ({active.name!r} is); "
                "call its activate() first"
                if active is not None
                else f"adapter {self.name!r} is not active"
            )

    # -- in the model, and out -----------------------------------------------------------------

    def put_in(self: Adapter) -> None:  # type: ignore[misc]
        """Make the LoRA children of the experts modules, which changes no forward."""
        name = child_name(self.name)
        for layer in self.layers.values():
            layer.experts.add_module(name, layer.lora)
            self._undo.append(_without_child(layer.experts, name))

    def take_out(self) -> None:
        """Undo ``put_in``, last first."""
        while self._undo:
            self._undo.pop()()

    # -- active, and resting -------------------------------------------------------------------

    def start(self: Adapter) -> None:  # type: ignore[misc]
        """Become the adapter of every forward and of the optimizer's steps."""
        for layer in self.layers.values():
            convention = convention_of(layer.experts)
            assert convention is not None
            weight = convention.first_weight(layer.experts)
            assert weight is not None
            layer.lora.to(device=weight.device)
            layer.lora.train(layer.experts.training)
            self._while_active.append(convention.install(layer.experts, layer.lora, self))
        for parameter in self.lora_parameters():
            parameter.requires_grad_(True)  # hooks need it, those of `use_only` too
        self._observe_gradients()
        self.watch = ForwardWatch(self.model, self.layers)
        self._while_active.append(self.watch.remove)
        self._while_active.append(OptimizerFollower(self).remove)
        self.show_routers(True)
        if len(self.named.by_name) > 1 and self.router_parameters():
            self._while_active.append(RouterGuard(self).remove)
        self.free_lora()
        self.free_routers()
        if self.unfinished:
            pending.fill(self, self.unfinished)
            self.unfinished = {}

    def _observe_gradients(self: Adapter) -> None:  # type: ignore[misc]
        loras = [layer.lora for layer in self.layers.values()]
        if not self.options.auto_step:
            self.accumulated = AccumulatedImportance(loras)
            self._while_active.append(self.accumulated.remove)
        # The garbage collector does not see through these hooks: a strong reference would keep
        # the model alive for ever.
        seen_by = weakref.WeakMethod(self.backward_seen)

        def seen_backward(parameter: Tensor) -> None:
            if (backward_seen := seen_by()) is not None:
                backward_seen(parameter)

        first = next(loras[0].parameters())
        seen = first.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            seen_backward
        )
        self._while_active.append(seen.remove)

    def stop(self: Adapter) -> None:  # type: ignore[misc]
        """Undo ``start``; what a step has gathered is put aside."""
        self.unfinished = pending.gathered(self)
        while self._while_active:
            self._while_active.pop()()
        self.show_routers(False)
        for parameter in [*self.lora_parameters(), *self.router_parameters().values()]:
            parameter.requires_grad_(False)
            parameter.grad = None
        self.accumulated = None
        self.forget()

    # -- routers -------------------------------------------------------------------------------

    @torch.no_grad()
    def show_routers(self: Adapter, wanted: bool) -> None:  # type: ignore[misc]
        """Have the trained router values in the model, or the original ones."""
        if wanted == self._routers_in:
            return
        for name, parameter in self.router_parameters().items():
            inside = parameter.detach().clone()
            if name in self._other_routers:  # else both are the original ones so far
                parameter.copy_(self._other_routers[name])
            self._other_routers[name] = inside
        self._routers_in = wanted

    def trained_routers(self: Adapter) -> dict[str, Tensor]:  # type: ignore[misc]
        """Router values of the adapted model by name, wherever they are now; not copies."""
        return {
            name: parameter.detach() if self._routers_in else self._other_routers[name]
            for name, parameter in self.router_parameters().items()
        }


class RouterGuard(OptimizerFollower):
    """Keeps the optimizers of resting adapters away from the routers.

    These are parameters of the model, so the optimizer of every adapter that trains them holds
    them; only that of the active one may move them.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter)
        self._hidden: list[tuple[nn.Parameter, Tensor | None]] = []

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._give_back()
        adapter = self._adapter()
        if adapter is None:
            return None
        resting = [o for o in adapter.named.by_name.values() if o is not adapter]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = [o for o in resting if any(id(p) in held for p in o.lora_parameters())]
        if not others:
            return None
        if not held & self._own:
            for parameter in adapter.router_parameters().values():
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None
        elif any(other.router_parameters() for other in others):
            raise AttachError(
                f"the optimizer holds adapter {adapter.name!r} and {others[0].name!r}, which "
                "train the same routers: what it remembers of one would move the other's; give "
                "each adapter an optimizer of its own"
            )
        return None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []


def _without_child(module: nn.Module, name: str) -> Callable[[], None]:
    def remove() -> None:
        del module._modules[name]

    return remove
