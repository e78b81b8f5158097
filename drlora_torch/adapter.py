"""The adapter: the handle of a model whose experts carry LoRA with dynamic ranks.

Shape letters: N experts, P rank slots, R = r_max rank dimensions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_core import AllocatorEngine, GrowthEvent
from drlora_torch import importance, optimizer
from drlora_torch.distributed import sum_over_processes
from drlora_torch.errors import AttachError
from drlora_torch.hub import AdapterFiles
from drlora_torch.layers import ExpertLoRA
from drlora_torch.merging import Mergeable
from drlora_torch.options import AdapterOptions, RouterMode
from drlora_torch.routing import RoutingCounter
from drlora_torch.switching import Switchable

if TYPE_CHECKING:
    from drlora_torch.models.records import MoELayer


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """One experts module with its LoRA."""

    record: MoELayer
    experts: nn.Module
    lora: ExpertLoRA
    router: nn.Module | None


class Adapter(Switchable, Mergeable, AdapterFiles):
    """Made by :func:`drlora_torch.attach` or :func:`drlora_torch.load`; not by hand.

    Attributes:
        name: the name among the adapters of the model, ``adapter_name`` of ``attach``.
        model: the adapted model.
        engine: the engine that decides the ranks.
        options: the options of ``attach``.
        layers: the adapted layers by name.
        events: growth events so far, oldest first.
        skipped_steps: optimizer steps whose statistics were not finite, or in which no token was
            counted; they count for nothing.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        engine: AllocatorEngine,
        options: AdapterOptions,
        layers: dict[str, AdaptedLayer],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.engine = engine
        self.options = options
        self.layers = layers
        self.events: list[GrowthEvent] = []
        self.skipped_steps = 0
        self._enabled = True
        self._paused = False
        self._use_only = False
        self._frozen_seen = False
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.gradients_seen = False  # of the step that is being gathered
        self.counters = {
            name: RoutingCounter(layer.record.num_experts) for name, layer in layers.items()
        }
        self.newborn = optimizer.NewbornCorrection(layer.lora for layer in layers.values())

    # -- what a user calls ---------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Everything to give to an optimizer: A and B of all layers, and routers that may learn.

        A and B of the active adapter require gradients again if something else froze them
        (``get_peft_model`` freezes whatever is not PEFT's).
        """
        self.check_attached()
        if self.is_active:
            self.free_lora()
        return self.lora_parameters() + list(self.router_parameters().values())

    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of all layers."""
        return [p for layer in self.layers.values() for p in layer.lora.parameters()]

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Router parameters that learn (now or after warmup), by qualified name."""
        if self.options.router is RouterMode.FROZEN:
            return {}
        return {
            f"{layer.record.router}.{name}": parameter
            for layer in self.layers.values()
            if layer.router is not None
            for name, parameter in layer.router.named_parameters()
        }

    def ranks(self) -> dict[str, np.ndarray]:
        """Active rank of every expert, int64 [N] by layer name."""
        layers = self.merged.layers if self.merged else self.layers
        return {name: layer.lora.table.ranks() for name, layer in layers.items()}

    def step(self, grad_scale: float = 1.0) -> GrowthEvent | None:
        """Close an optimizer step by hand; only with ``auto_step=False``.

        Call it once per optimizer step, after the update; ``zero_grad`` may come before or after.

        Args:
            grad_scale: what the loss was multiplied with (``GradScaler.get_scale()``).

        Returns:
            The growth event that followed, or None.

        Raises:
            AttachError: with ``auto_step=True``, after ``detach``, or while another adapter is
                active.
        """
        self.check_active()
        if self.accumulated is None:
            raise AttachError(
                "adapter.step() is called for you after every optimizer.step(); use "
                "attach(..., auto_step=False) to call it yourself"
            )
        return self._close_step(self.accumulated.take(grad_scale))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, routers included; nothing is counted.

        Raises:
            AttachError: another adapter is active: the model would not be the base model.
        """
        self.check_active()
        before, self._enabled = self._enabled, False
        self.show_routers(False)
        try:
            yield
        finally:
            self._enabled = before
            if self.is_active:
                self.show_routers(before)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no statistics are taken and optimizer steps do not count."""
        self.check_attached()
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def use_only(self) -> None:
        """Count nothing and need no gradient from now on: ``load(..., trainable=False)``."""
        self._paused = self._use_only = True
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    # -- what the forwards tell ----------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """False inside :meth:`disabled`."""
        return self._enabled

    @property
    def is_paused(self) -> bool:
        """True inside :meth:`paused`."""
        return self._paused

    def routed(self, name: str, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Count a routing decision if the running forward counts."""
        forward = self.watch.current(self.layers[name].experts.training)
        if not forward.counts or self._paused:
            return
        if not self._frozen_seen:
            self._warn_if_frozen()
        if name == next(iter(self.layers)) and (self.gradients_dropped() or self._overflowed()):
            self.forget()
        mask = forward.token_mask(top_k_index.shape[0])
        self.counters[name].add(top_k_index, top_k_weights, mask)

    def _warn_if_frozen(self) -> None:
        lora = next(iter(self.layers.values())).lora
        if any(parameter.requires_grad for parameter in lora.parameters()):
            return
        self._frozen_seen = True
        warnings.warn(
            "the expert LoRA is frozen, so it does not learn: something froze it after attach "
            "(get_peft_model does); call adapter.parameters() after that and before the optimizer "
            "is made",
            RuntimeWarning,
            stacklevel=2,
        )

    def backward_seen(self, parameter: Tensor) -> None:
        """Note that gradients of this step have begun to arrive."""
        self.gradients_seen = True

    def gradients_dropped(self) -> bool:
        """True if the gradients of the last backward were cleared without an optimizer step."""
        if not self.gradients_seen:
            return False
        lora = next(iter(self.layers.values())).lora
        grads = [p.grad for p in lora.parameters() if p.grad is not None]
        return not any(bool(grad.any()) for grad in grads)

    def _overflowed(self) -> bool:
        """True if gradients that have arrived are not finite, so that their step cannot count.

        ``GradScaler`` skips it without a word; if ``zero_grad`` comes after the next forward, this
        is the only sign.
        """
        lora = [p for layer in self.layers.values() for p in layer.lora.parameters()]
        grads = [p.grad for p in lora if p.grad is not None] if self.gradients_seen else []
        return not all(bool(grad.isfinite().all()) for grad in grads)

    def forget(self) -> None:
        """Forget what the step has gathered so far."""
        for counter in self.counters.values():
            counter.reset()
        self.gradients_seen = False

    # -- what the optimizer's step brings ------------------------------------------------------

    def optimizer_stepped(self, user: Optimizer, slots: Mapping[str, Tensor | None]) -> None:
        """Follow a step of the user's optimizer; ``slots`` is the importance read before it."""
        self._optimizers.add(user)
        if self.options.newborn is optimizer.Newborn.CORRECTED:
            self.newborn.after_step(user)
        if self._paused:
            self.newborn.age()
        if self.accumulated is None:
            self.forget() if self._paused else self._close_step(slots)

    def _close_step(self, slots: Mapping[str, Tensor | None]) -> GrowthEvent | None:
        """Give the engine the statistics of one optimizer step and carry out its decision."""
        self._observe(self._take_routing(), slots)
        self.newborn.age()
        event = self.engine.step()
        if event is not None:
            self._carry_out(event)
        self.free_routers()
        return event

    def _take_routing(self) -> dict[str, np.ndarray]:
        """Routing totals of the step over all processes, [N + 1] by layer; counting restarts."""
        local = [self.counters[name].totals() for name in self.layers]
        self.forget()
        device = next(iter(self.layers.values())).lora.device
        summed = sum_over_processes(np.concatenate(local), device)
        parts = np.split(summed, np.cumsum([part.size for part in local])[:-1])
        return dict(zip(self.layers, parts, strict=True))

    def _observe(
        self, totals: Mapping[str, np.ndarray], slots: Mapping[str, Tensor | None]
    ) -> None:
        """Hand the step's samples to the engine; a layer that saw no token has none."""
        samples = {
            name: (
                totals[name][:-1] / totals[name][-1],
                importance.by_dimension(layer.lora, slots[name]),
            )
            for name, layer in self.layers.items()
            if totals[name][-1] != 0
        }
        if not samples:
            self._skip_step("no token was counted (is the model in evaluation mode?)")
        elif not all(np.isfinite(part).all() for sample in samples.values() for part in sample):
            self._skip_step("routing or importance is not finite")
            samples = {}
        for name in self.layers:
            if name in samples:
                phi, s = samples[name]
                tokens = int(totals[name][-1])
                self.engine.observe(name, routing=phi, importance=s, tokens=tokens)
            else:
                self.engine.skip(name)

    def _skip_step(self, reason: str) -> None:
        if not self.skipped_steps:
            warnings.warn(
                f"step {self.engine.step_count + 1}: {reason}; the step counts for nothing in the "
                "allocation (adapter.skipped_steps counts them)",
                RuntimeWarning,
                stacklevel=2,
            )
        self.skipped_steps += 1

    def _carry_out(self, event: GrowthEvent) -> None:
        for name, layer in self.layers.items():
            lora = layer.lora
            if name in event.cut:
                freed = lora.table.cut(event.cut[name])
                lora.clear(freed)
                self._changed(lora, freed)
                self.newborn.freed(name, freed)
            else:
                born = lora.table.grow(event.deltas[name])
                lora.birth(born)
                self._changed(lora, born.slots)
                self.newborn.born(name, born.slots)
        self.events.append(event)

    def _changed(self, lora: ExpertLoRA, slots: np.ndarray) -> None:
        for user in self._optimizers if slots.size else ():
            for parameter in lora.parameters():
                optimizer.clear_state(user, parameter, slots)

    # -- what learns -------------------------------------------------------------------------------

    def free_lora(self) -> None:
        """Let A and B learn, unless the adapter is for use only."""
        for parameter in self.lora_parameters():
            parameter.requires_grad_(not self._use_only)

    def free_routers(self) -> None:
        """Let the routers learn as the mode says (``after_warmup``: once the warmup is over).

        Those of the active adapter, that is; a resting one has none in the model.
        """
        warm = self.engine.step_count >= self.engine.config.warmup_steps
        learn = not self._use_only and (warm or self.options.router is RouterMode.TRAINABLE)
        for parameter in self.router_parameters().values() if self.is_active else ():
            parameter.requires_grad_(learn)

    # -- life ----------------------------------------------------------------------------------

    def __reduce__(self) -> str:
        raise AttachError(
            "a model with an adapter can be neither copied nor pickled: both models would count "
            "in one engine; use save_pretrained and load, or detach() first"
        )

    def check_attached(self) -> None:
        """Refuse what only an adapter that is in its model can do."""
        self.check_not_merged()
        if not self.layers:
            raise AttachError("this adapter was detached or merged; attach a new one")
