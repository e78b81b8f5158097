"""Close an optimizer step: its statistics go to the host, and from there to the engine.

On the CPU that happens at once. A device is not waited for: the step is closed when its statistics
have arrived, at the end of the next step at the latest, or as soon as anyone asks the engine for
something. A few steps wait for their own: one that may end with a growth event, the last of the
warmup, the engine's first, and the first of an adapter in this process, so that whatever cannot
work says so there.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from drlora_core import GrowthEvent
from drlora_torch.attached import Attached
from drlora_torch.step import exchange, growth, newborn, samples
from drlora_torch.step.exchange import Note, Sent
from drlora_torch.step.newborn import Young
from drlora_torch.step.notices import Notices
from drlora_torch.step.readback import Readback

logger = logging.getLogger(__name__)


class StepCloser:
    """Closes the steps of one adapter, in their order."""

    def __init__(self, attached: Attached, notices: Notices) -> None:
        # Weak, since the engine holds a step that it waits for, and the adapter the engine.
        self._attached = weakref.ref(attached)
        self._notices = notices
        self._young: Young | None = None
        self.begun = False
        """True once a step of this adapter was closed in this process."""

    def young(self, attached: Attached) -> Young:
        """The newborn rows on their devices."""
        if self._young is None:
            attached.engine.settle()
            self._young = Young([layer.lora for layer in attached.layers.values()], attached.ages)
        return self._young

    def forget_young(self) -> None:
        """Forget these rows: others have become newborn, or their ages were loaded."""
        self._young = None

    def close(
        self,
        attached: Attached,
        sums: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        *,
        idle: Tensor | None,
        horizon: float,
        notes: Sequence[Note],
    ) -> GrowthEvent | None:
        """Close a step that counts, as :func:`drlora_torch.step.exchange.send` takes it.

        Args:
            horizon: own steps after which rows need no correction any more; 0: none was corrected.

        Returns:
            The growth event that followed; None where there was none.
        """
        engine = attached.engine
        engine.settle()
        sent = exchange.send(attached, sums, slots, idle, notes)
        if horizon and self._young is not None:
            self._young.advance(idle, horizon)
        if not (sent.readback.is_on_host or self._waits(attached)):
            attached.known_steps = engine.step_count
            engine.defer(partial(self._arrive_late, sent, horizon))
            return None
        event = self._arrive(sent, horizon)
        self.begun = True
        return event

    def close_paused(self, attached: Attached, *, idle: Tensor | None, horizon: float) -> None:
        """Close a step that does not count, but in which newborn rows may have grown older."""
        if not horizon:
            return
        if self._young is not None:
            self._young.advance(idle, horizon)
        if idle is None:
            self._grow_older(attached, horizon)
            return
        attached.engine.settle()
        readback = Readback(idle.reshape(1))
        attached.engine.defer(partial(self._arrive_paused, readback, horizon))

    def _waits(self, attached: Attached) -> bool:
        """True for a step that waits for its own statistics."""
        config, steps = attached.engine.config, attached.engine.step_count
        ends_warmup = steps + 1 == config.warmup_steps  # routers are asked for it in backward
        return not self.begun or not steps or ends_warmup or growth.may_follow(attached)

    def _arrive_late(self, sent: Sent, horizon: float) -> None:
        self._arrive(sent, horizon)

    def _arrive(self, sent: Sent, horizon: float) -> GrowthEvent | None:
        statistics, attached = sent.arrive(), self._attached()
        if attached is None:
            logger.warning(
                "the last step of an adapter that was dropped without detach() was still on its "
                "way to the engine, which does not count it"
            )
            return None
        if statistics.idle and attached.options.auto_step:
            return None  # as if the optimizer had not been called
        growth.check_event(attached)
        with attached.engine.driver.acting():
            samples.observe(attached, statistics.routing, statistics.importance)
            if not statistics.idle:
                self._grow_older(attached, horizon)
            event = attached.engine.step()
        if event is not None:
            growth.carry_out(attached, event)
            self.forget_young()
            self._notices.uncorrected(attached)
        return event

    def _arrive_paused(self, readback: Readback, horizon: float) -> None:
        attached = self._attached()
        if attached is not None and not readback.values()[0]:
            self._grow_older(attached, horizon)

    def _grow_older(self, attached: Attached, horizon: float) -> None:
        retired = bool(horizon) and newborn.grow_older(attached.ages, horizon)
        if retired and self._young is not None:
            self._young.retire(attached.ages)
