"""One optimizer step: its routing and importance are gathered, read and handed to the engine.

The routing of a forward counts when the backward pass reaches the experts' output of that forward,
once. So evaluation, generation, dropped batches and exceptions need no rule of their own, and
gradient checkpointing counts once in both of its modes: the recomputed graph of the non-reentrant
mode has no backward pass of its own, and the first forward of the reentrant mode has no graph.

Shape letters: T tokens, K experts per token, N experts, P rank slots.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora_core import GrowthEvent
from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, refuse_copy
from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models import frameworks
from drlora_torch.options import Newborn
from drlora_torch.step import compiled, growth, hooks, newborn, parameters, pending, sharded
from drlora_torch.step.backward import BackwardPasses
from drlora_torch.step.closing import StepCloser
from drlora_torch.step.exchange import Consume, Note
from drlora_torch.step.foreign_optimizers import ForeignOptimizers, check_fresh
from drlora_torch.step.forwards import ForwardWatch
from drlora_torch.step.importance import ImportanceReader, keep_if, slot_importance
from drlora_torch.step.notices import Notices
from drlora_torch.step.optimizers.correction import Snapshot
from drlora_torch.step.own_optimizers import OwnOptimizers, check_complete, holds_lora
from drlora_torch.step.readback import is_on_host
from drlora_torch.step.routing import Routing, sum_weights

COUNTED = -1  # number of a checkpointed forward that was counted already
NOTES = 4096
"""Most notes of forwards that wait for the end of a step; with more, no step may be coming."""


class StepTracker:
    """Gathers, reads and closes the optimizer steps of the active adapter.

    It is the :class:`drlora_torch.models.convention.Observer` of the adapted layers.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self._number = compiled.register(self)
        self._notices = Notices()
        self._foreign = ForeignOptimizers(attached)
        self._own = OwnOptimizers()
        self._forwards = 0  # of all layers so far
        self._newest_counted = 0  # forwards made when routing was counted last
        self._sums: dict[str, Tensor] = {}  # float64 [N + 1] by layer
        self._slots: dict[str, Tensor] | None = None  # importance [P], read before the step
        self._snapshots: list[Snapshot] = []
        self._horizon = 0.0  # of the newborn corrections in this step
        self._skips: list[Tensor | None] = []  # of the optimizer's steps in it: bool [], on devices
        self._notes: list[Note] = []
        self._closer = StepCloser(attached, self._notices)
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        with contextlib.ExitStack() as undo:
            self._reader: ImportanceReader | None = None
            if not attached.options.auto_step:
                self._reader = ImportanceReader(self._loras(), attached.options.importance)
                undo.callback(self._reader.remove)
            self._passes = BackwardPasses(attached, self._reader)
            self._watch = ForwardWatch(attached.model, attached.layers, self._passes.begin)
            undo.callback(self._watch.remove)
            follow = hooks.follow_optimizers
            undo.callback(follow(self, StepTracker._before_step, StepTracker._after_step))
            self.remove = undo.pop_all().close  # take all hooks out

    __reduce__ = refuse_copy

    def silence(self, notice: str) -> None:
        """Leave out a notice of :class:`~drlora_torch.step.notices.Notices`."""
        self._notices.silence(notice)

    def forget(self) -> None:
        """Forget what the step has gathered so far."""
        self._sums.clear()
        self._passes.forget()

    # -- gather --------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return self.attached.enabled

    def routed(
        self, lora: ExpertLoRA, output: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        if torch.compiler.is_compiling():
            call = self._watch.of_layer
            return compiled.count(self._number, lora, output, top_k_index, top_k_weights, call)
        if not self.attached.paused:
            self._forward(lora, output, top_k_index, top_k_weights)
        return output

    def began(self, layer: str) -> int:
        """Note a compiled forward of a layer; return its number, or that it does not count."""
        if self.attached.paused:
            return compiled.NOT_COUNTED
        self._forwards += 1
        if self._watch.begins_training():
            frameworks.check_training(self.attached.layers[layer].lora)
        return self._forwards

    def _forward(
        self, lora: ExpertLoRA, output: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> None:
        """Note a forward of a layer, which counts once backward reaches its output."""
        self.attached.options.routing.check(top_k_weights)
        self._forwards += 1
        number, call = self._forwards, self._watch.running
        if self._watch.begins_training():
            frameworks.check_training(lora)
        if not torch.is_grad_enabled():
            if call is not None and call.with_gradients:  # reentrant checkpointing, perhaps
                call.checkpointed[lora.name] = number
            return
        if call is None and (call := self._watch.checkpointed_call(lora.name)) is not None:
            number, call.checkpointed[lora.name] = call.checkpointed[lora.name], COUNTED
        if output.requires_grad and number != COUNTED:
            routing = Routing(lora.name, number, top_k_index, top_k_weights.detach(), call)
            _call_once(output, weakref.ref(self), routing)

    def reached(self, routing: Routing) -> None:
        """Count a forward whose output the backward pass has reached."""
        if self.attached.paused:
            return
        new = self._passes.is_new()
        if self._begins(routing) and new and self._sums:
            self._keep(self._passes.alive())
        self._newest_counted = self._forwards
        self._passes.reach(routing.layer)
        self._foreign.reached()
        layer = self.attached.layers[routing.layer]
        self._notices.check_training(layer)
        self._notices.check_saving(self.attached)
        index, mask = routing.top_k_index, self._mask(routing)
        weights = self.attached.options.routing.measure(routing.top_k_weights)
        sums = sum_weights(index, weights, mask, layer.record.num_experts)
        if routing.layer in self._sums:
            sums = self._sums[routing.layer] + sums
        self._sums[routing.layer] = sums

    def _keep(self, alive: Tensor | bool) -> None:
        """Keep what the step has gathered if its gradients are still there."""
        if isinstance(alive, Tensor):
            self._sums = {name: keep_if(alive, sums) for name, sums in self._sums.items()}
            self._passes.keep(alive)
        elif not alive:
            self.forget()

    def look_at(self, values: Tensor, consume: Consume) -> None:
        """Have the host look at values of a forward [n]: at once where no step may follow it."""
        call = self._watch.running
        trains = torch.is_grad_enabled() or (call is not None and call.with_gradients)
        self._note(values, consume, now=not trains)

    def _note(self, values: Tensor, consume: Consume, *, now: bool = False) -> None:
        """Send values to the host with the statistics of the step.

        At once, where that does not wait, and until the first step is closed.
        """
        wait = now or not self._closer.begun or len(self._notes) >= NOTES
        if wait or is_on_host(values):
            consume(values.cpu().double().numpy())
        else:
            self._notes.append((values, consume))

    def _begins(self, routing: Routing) -> bool:
        """True for the first layer that the backward pass of a forward reaches."""
        if routing.call is None:
            return routing.number > self._newest_counted
        first, routing.call.reached = not routing.call.reached, True
        return first

    def _mask(self, routing: Routing) -> Tensor | None:
        """Which tokens of a forward count, bool [T]; None for all."""
        call, num_tokens = routing.call, routing.top_k_index.shape[0]
        if call is None or call.mask is None:
            return None
        tell = partial(self._notices.unaligned_mask, routing.layer, num_tokens, call.mask.shape)
        if (found := call.token_mask(num_tokens)) is None:
            tell()
            return None
        mask, aligned = found
        if aligned is not None:
            self._note(aligned.reshape(1), lambda values: None if values[0] else tell())
        return mask.to(routing.top_k_index.device)

    def _loras(self) -> list[ExpertLoRA]:
        return [layer.lora for layer in self.attached.layers.values()]

    def _lora_parameters(self) -> list[torch.nn.Parameter]:
        return parameters.lora_parameters(self.attached)

    # -- read ----------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: Optimizer, closure: hooks.Closure | None
    ) -> hooks.Closure | None:
        self._slots, self._snapshots = None, []
        sharded.free_gathered(self.attached)
        own = self._lora_parameters()
        if not holds_lora(optimizer, self.attached, own):
            waits, later = bool(self._sums), closure is not None
            self._foreign.check(optimizer, self.attached, waiting=waits, has_closure=later)
            return None
        self._check_step(optimizer, own)
        growth.meet_optimizer(self.attached, optimizer)
        self._foreign.own_step()
        if closure is None:
            self._read(optimizer)
            return None
        inner = closure

        def closure_then_read() -> object:
            loss = inner()
            self._read(optimizer)
            return loss

        return closure_then_read

    def _check_step(self, optimizer: Optimizer, own: list[torch.nn.Parameter]) -> None:
        """Refuse a step of the adapter's optimizer that would train something else."""
        parameters.check_in_place(self.attached)
        check_fresh(optimizer, self.attached)
        self._own.check_cast(optimizer, own)
        if optimizer not in self._checked:
            sharded.check_rows(self.attached)
            check_complete(optimizer, self.attached)
        if not self.attached.enabled and parameters.base_parameters(self.attached):
            raise AttachError(
                "an optimizer step inside adapter.disabled() would move the base model's own "
                "parameters; step outside of it"
            )

    def _read(self, optimizer: Optimizer) -> None:
        """Read importance from the gradients that the optimizer is about to use."""
        skipped = _skipped(optimizer)
        if not isinstance(skipped, Tensor) and skipped:
            return
        own = self._lora_parameters()
        if all(parameter.grad is None for parameter in own):
            if self._passes.missed and self._reader is None and own[0].requires_grad:
                self._notices.no_gradients()
            return  # this step does not train the adapter
        if not self._sums and hooks.is_at_rest(optimizer):
            return  # a trial, see hooks.is_trial
        if not self._sums and not self.attached.paused:
            self._own.check_alone(optimizer, self.attached)
        self._notices.check_reached(self.attached)
        scale = getattr(optimizer, "grad_scale", None)
        scale, signal = (
            scale if isinstance(scale, Tensor) else None,
            self.attached.options.importance,
        )
        self._slots = {} if self.attached.paused else slot_importance(self._loras(), signal, scale)
        if self._reader is None:
            self._skips.clear()  # of a step that failed
        self._skips.append(skipped if isinstance(skipped, Tensor) else None)
        if self.attached.options.newborn is Newborn.CORRECTED:
            self._snapshots = self._closer.young(self.attached).snapshot(optimizer)

    # -- close ---------------------------------------------------------------------------------

    def _after_step(self, optimizer: Optimizer) -> None:
        slots, self._slots = self._slots, None
        skipped = _skipped(optimizer)
        by_device = skipped if isinstance(skipped, Tensor) else None
        moves = by_device is not None or not skipped
        if slots is not None or (optimizer in self.attached.optimizers and moves):
            self._check(optimizer)
            horizon = newborn.correct(self._snapshots, optimizer, by_device)
            self._horizon = max(self._horizon, horizon)
            growth.hold_free_slots(self.attached, optimizer)
        self._snapshots = []
        if slots is None:
            return  # it trains others, or wraps an optimizer whose step was closed already
        self._own.note_step(optimizer)
        if self._reader is None:
            self._close(slots)
        elif self.attached.paused:
            self._close_paused()

    def _check(self, optimizer: Optimizer) -> None:
        """Refuse unknown state after the first step that moved the LoRA."""
        moved = any(parameter.grad is not None for parameter in self._lora_parameters())
        if moved and optimizer not in self._checked:
            growth.check_optimizer(self.attached, optimizer)
            self._checked.add(optimizer)

    def close_by_hand(self, grad_scale: float) -> GrowthEvent | None:
        if self._reader is None:
            raise AttachError(
                "adapter.step() is called for you after every optimizer.step(); use "
                "attach(..., auto_step=False) to call it yourself"
            )
        sharded.free_gathered(self.attached)
        if not self.attached.engine.step_count:  # no optimizer of torch may have stepped
            sharded.check_rows(self.attached)
        return self._close(self._reader.take(self._loras(), grad_scale))

    def _close(self, slots: dict[str, Tensor]) -> GrowthEvent | None:
        if self.attached.paused:
            self.forget()
            self._close_paused()
            return None
        sums, notes = dict(self._sums), list(self._notes)
        self._notes.clear()
        self.forget()
        idle, horizon = self._take_skips()
        return self._closer.close(
            self.attached, sums, slots, idle=idle, horizon=horizon, notes=notes
        )

    def _close_paused(self) -> None:
        idle, horizon = self._take_skips()
        self._closer.close_paused(self.attached, idle=idle, horizon=horizon)

    def _take_skips(self) -> tuple[Tensor | None, float]:
        """Whether no optimizer has moved the LoRA, where a device knows, and the horizon."""
        skips, horizon = self._skips, self._horizon
        self._skips, self._horizon = [], 0.0
        flags = [flag for flag in skips if flag is not None]
        idle = torch.stack(flags).all() if flags and len(flags) == len(skips) else None
        return idle, horizon

    # -- the partial state of a step -----------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Partial state of the current optimizer step, see ``pending``; empty between steps."""
        gathered = self._sums or self._passes.seen
        if self._reader is None and gathered and not self._passes.alive():
            return {}  # the batch was dropped, as the next backward pass will notice
        read = {} if self._reader is None else self._reader.parts
        return pending.save(self.attached, self._sums, read, gradients=self._passes.seen)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on in the middle of a step, or between steps if ``state`` has nothing of one."""
        self.forget()
        self._closer.forget_young()
        self._sums, importance, arrived = pending.load(self.attached, state)
        if self._reader is not None:
            self._reader.parts = importance
        if arrived:
            self._passes.take_as_arrived()


def _skipped(optimizer: Optimizer) -> Tensor | bool:
    """True for a fused optimizer that leaves the parameters as they are in this step.

    bool [] on a device where only that knows.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, Tensor):
        return False
    found = parts.local(found_inf).any()
    return bool(found) if is_on_host(found) else found


def _call_once(output: Tensor, tracker: weakref.ref[StepTracker], routing: Routing) -> None:
    """Have the tracker count a forward when backward reaches ``output``, once.

    The graph must keep neither the tracker nor, once counted, the routing: a loss that is kept for
    logging would keep the model.
    """

    def reached(gradient: Tensor) -> None:
        handle.remove()
        if (alive := tracker()) is not None:
            alive.reached(routing)

    handle = output.register_hook(reached)  # type: ignore[no-untyped-call]
