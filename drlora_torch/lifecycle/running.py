"""The active adapter of a model: in every forward and in the optimizer's steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from drlora_torch.attached import Attached
from drlora_torch.lifecycle import dense
from drlora_torch.lifecycle.trained import TrainedGuard, show_trained
from drlora_torch.lora import parts
from drlora_torch.models.conventions import convention_of
from drlora_torch.step.parameters import (
    base_parameters,
    freeze_all,
    lora_parameters,
    unfreeze_base,
    unfreeze_lora,
)
from drlora_torch.step.sharded import free_gathered
from drlora_torch.step.tracker import StepTracker
from drlora_torch.step.warmup import hold_routers

AllOfModel = Callable[[], Iterable[Attached]]


class Running:
    """An adapter that is active, from :meth:`start` to :meth:`stop`."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        free_gathered(attached)
        for parameter in lora_parameters(attached):
            parameter.requires_grad_(True)  # hooks need it, for inference too
        self.tracker = StepTracker(attached)
        self._undo = contextlib.ExitStack()
        self._undo.callback(self.tracker.remove)

    def start(self, all_of_model: AllOfModel) -> None:
        """Install the LoRA in the forwards and let it learn."""
        attached = self.attached
        for layer in attached.layers.values():
            convention = convention_of(layer.experts)
            weight = convention.first_weight(layer.experts)
            assert weight is not None
            if not any(map(parts.is_sharded, layer.lora.parameters())):
                layer.lora.to(device=weight.device)
            layer.lora.train(layer.experts.training)
            self._undo.callback(convention.install(layer.experts, layer.lora, self.tracker))
        self._undo.callback(dense.install(attached))
        show_trained(attached, True)
        if len(list(all_of_model())) > 1 and base_parameters(attached):
            self._undo.callback(TrainedGuard(attached, all_of_model).stop)
        unfreeze_lora(attached)
        unfreeze_base(attached)
        self._undo.callback(hold_routers(attached))
        if attached.unfinished:
            self.tracker.load_state_dict(attached.unfinished)
            attached.unfinished = {}

    def stop(self) -> None:
        """Undo :meth:`start`; the partial state of the current step is put aside."""
        self.attached.engine.settle()  # a step on its way still needs the layers
        free_gathered(self.attached)
        if not self.attached.unfinished:  # else it never got as far as to take it
            self.attached.unfinished = self.tracker.state_dict()
        self._undo.close()
        show_trained(self.attached, False)
        freeze_all(self.attached)
