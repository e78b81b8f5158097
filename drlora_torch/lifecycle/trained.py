"""Parameters of the base model that an adapter trains: the base's values, and the trained ones.

They are the routers, unless these are frozen, and the modules of ``modules_to_save``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.lora import parts
from drlora_torch.step import hooks
from drlora_torch.step.parameters import base_parameters, lora_parameters
from drlora_torch.step.sharded import free_gathered

logger = logging.getLogger(__name__)


@torch.no_grad()
def show_trained(attached: Attached, wanted: bool) -> None:
    """Have the trained values in the model, or the base's.

    Tensors are exchanged, not copied over: a backward pass whose forward ran before (DPO asks the
    base model in between) still finds the values it needs, unchanged. ``fully_shard`` keeps views
    of the memory of a parameter and gathers it for each pass anew, so there values move.
    """
    if wanted == attached.trained_shown:
        return
    free_gathered(attached)
    for name, parameter in base_parameters(attached).items():
        inside = parameter.data
        other = attached.hidden_values.get(name)
        if other is not None and other.shape != inside.shape:
            logger.warning("%s was resized since attach and stays as it is", name)
            continue
        if not parts.is_sharded(parameter):
            parameter.data = inside.clone() if other is None else other.to(inside)
            attached.hidden_values[name] = inside
            continue
        attached.hidden_values[name] = inside.clone()
        if other is not None:
            parts.write(parameter, other)
    attached.trained_shown = wanted


def trained_values(attached: Attached) -> dict[str, Tensor]:
    """Trained values of base parameters by name, wherever they are now; not copies."""
    return {
        name: parameter.detach() if attached.trained_shown else attached.hidden_values[name]
        for name, parameter in base_parameters(attached).items()
    }


class TrainedGuard:
    """Keeps the optimizers of inactive adapters away from base parameters.

    The optimizer of every adapter that trains a base parameter holds it; only that of the active
    one may move it.
    """

    def __init__(self, active: Attached, all_of_model: Callable[[], Iterable[Attached]]) -> None:
        self._active = active
        self._all = all_of_model
        self._hidden: list[tuple[nn.Parameter, Tensor | None]] = []
        self._stop_following = hooks.follow_optimizers(
            self, TrainedGuard._before_step, TrainedGuard._after_step
        )

    def stop(self) -> None:
        """End guarding."""
        self._stop_following()

    def _before_step(self, optimizer: Optimizer, closure: hooks.Closure | None) -> None:
        self._give_back()
        inactive = [other for other in self._all() if other is not self._active]
        others = [o for o in inactive if hooks.count_held(optimizer, lora_parameters(o))]
        if not others:
            return
        if not hooks.count_held(optimizer, lora_parameters(self._active)):
            for parameter in base_parameters(self._active).values():
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None
        elif any(base_parameters(other) for other in others):
            raise AttachError(
                f"the optimizer holds adapter {self._active.name!r} and {others[0].name!r}, which "
                "train the same parameters of the base: what it remembers of one would move the "
                "other's; give each adapter an optimizer of its own"
            )

    def _after_step(self, optimizer: Optimizer) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []
