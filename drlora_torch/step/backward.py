"""Backward passes: which one is running, and what it has left when it ends.

Gradients are looked at when everything that averages them over processes has done so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.lora import parts
from drlora_torch.step import warmup
from drlora_torch.step.importance import ImportanceReader
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.step.processes import several_processes, sum_over_processes
from drlora_torch.step.witness import GradientWitness

NONE = -1  # torch's number of the pass that is running, outside of one


class BackwardPasses:
    """Follows the backward passes that reach the layers of an adapter.

    Args:
        attached: the adapter.
        reader: what reads importance in each pass; None where an optimizer's step is the time.
    """

    def __init__(self, attached: Attached, reader: ImportanceReader | None) -> None:
        self._attached = attached
        self._reader = reader
        self._witness = GradientWitness()
        self._reached: dict[str, None] = {}  # layers of the pass that is running
        self._running = NONE

    @property
    def seen(self) -> bool:
        """True if gradients of this step have arrived, or were to."""
        return self._witness.seen

    @property
    def missed(self) -> bool:
        """True if the passes of this step have left no gradient on the LoRA."""
        return self._witness.missed

    def is_new(self) -> bool:
        """True where another pass is running than at the last call."""
        before, self._running = self._running, torch._C._current_graph_task_id()
        return before != self._running or self._running == NONE

    def reach(self, layer: str) -> None:
        """Note that the running pass has come to a layer: its gradients are next.

        A pass that fails drops its callbacks, so each layer queues one; the first that runs looks
        at all.
        """
        self._witness.expect(layer, self._attached.layers[layer].lora.matrices())
        self._reached[layer] = None
        self._at_the_end(self._ended)

    def begin(self) -> None:
        """Note a pass with others inside of it, of which none is the end."""
        self._at_the_end(lambda: self._look(self._attached.layers))

    def alive(self) -> Tensor | bool:
        """False if gradients had arrived, and nothing is left of them; see the witness."""
        return self._witness.alive(self._anywhere)

    def keep(self, wanted: Tensor) -> None:
        """Go on; keep the importance that was read only if a device says so, bool []."""
        self._witness.accept()
        if self._reader is not None:
            self._reader.keep(wanted)

    def take_as_arrived(self) -> None:
        """Take gradients that were set by hand for some that have arrived."""
        for name, layer in self._attached.layers.items():
            self._witness.note(name, layer.lora.matrices())

    def forget(self) -> None:
        """Begin a new step."""
        self._witness.forget()
        if self._reader is not None:
            self._reader.parts.clear()

    def _at_the_end(self, call: Callable[[], None]) -> None:
        """Have something done after a pass.

        Callbacks run in order; one that is queued by a callback comes after those of
        DistributedDataParallel and ``fully_shard``, which average.
        """
        queue = torch.autograd.Variable._execution_engine.queue_callback
        try:
            queue(lambda: queue(call))
        except AssertionError as error:  # compiled autograd has no such callbacks
            if several_processes(self._attached.process_group):
                raise AttachError(
                    "compiled autograd does not tell when gradients have been averaged over "
                    "processes; train without torch._dynamo.config.compiled_autograd"
                ) from error

    def _ended(self) -> None:
        reached, self._reached = self._reached, {}
        self._look(reached)

    def _look(self, layers: Iterable[str]) -> None:
        several = several_processes(self._attached.process_group)
        for name in layers:
            lora = self._attached.layers[name].lora
            self._witness.note(name, lora.matrices())
            if several and self._reader is not None:
                self._reader.read(lora)
        if several:
            warmup.drop_gradients(self._attached)

    def _anywhere(self, here: Tensor) -> Tensor:
        """True if something holds in any of the processes that hold the LoRA together, bool []."""
        if not any(map(parts.is_sharded, lora_parameters(self._attached))):
            return here
        device = next(iter(self._attached.layers.values())).lora.compute_device
        held = here.to(device, torch.float32)
        return sum_over_processes(held, self._attached.process_group) > 0
