"""Optimizers that hold the adapter: one steps the expert LoRA, and nothing that learns is left out.

What holds nothing of it is looked at in :mod:`drlora_torch.step.foreign_optimizers`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.step import hooks
from drlora_torch.step.parameters import lora_parameters, parameters_by_key


class OwnOptimizers:
    """The optimizers that step the expert LoRA of one adapter."""

    def __init__(self) -> None:
        self._last: weakref.ref[Optimizer] | None = None
        self._dtypes: weakref.WeakKeyDictionary[Optimizer, tuple[torch.dtype, torch.dtype]] = (
            weakref.WeakKeyDictionary()
        )
        """Of the first and the last parameter, when each optimizer has stepped last."""

    def note_step(self, optimizer: Optimizer) -> None:
        """Note that an optimizer has made the step that was closed last."""
        self._last = weakref.ref(optimizer)

    def check_alone(self, optimizer: Optimizer, attached: Attached) -> None:
        """Refuse a step on gradients that another optimizer has just used.

        Raises:
            AttachError: two optimizers step the LoRA after each backward pass.
        """
        last = None if self._last is None else self._last()
        if last is None or last is optimizer or not attached.options.auto_step:
            return
        raise AttachError(
            f"the {type(last).__name__} and now the {type(optimizer).__name__} step the LoRA of "
            f"adapter {attached.name!r}, without a backward pass in between: each would count as a "
            "step; let one optimizer hold adapter.parameters() (in several param_groups, if "
            "need be)"
        )

    def check_cast(self, optimizer: Optimizer, own: Sequence[nn.Parameter]) -> None:
        """Refuse parameters of another dtype than the optimizer's state was made for.

        Raises:
            AttachError: the model was cast, and the state was not.
        """
        now = own[0].dtype, own[-1].dtype
        before = self._dtypes.get(optimizer, now)
        if before != now:
            for parameter, dtype in zip((own[0], own[-1]), before, strict=True):
                _check_state_dtype(optimizer, parameter, dtype)
        self._dtypes[optimizer] = now


def holds_lora(optimizer: Optimizer, attached: Attached, own: list[nn.Parameter]) -> bool:
    """True if an optimizer holds the expert LoRA.

    Raises:
        AttachError: it holds a part of it.
    """
    held = hooks.count_held(optimizer, own)
    if attached.options.auto_step and 0 < held < len(own):
        raise AttachError(
            f"the optimizer holds {held} of the adapter's {len(own)} LoRA parameters; wrong:\n"
            "    AdamW(some of adapter.parameters())\nright:\n"
            "    AdamW(adapter.parameters())\nor attach(..., auto_step=False) and call "
            "adapter.step() once all optimizers have stepped"
        )
    return held > 0


def check_complete(optimizer: Optimizer, attached: Attached) -> None:
    """Refuse to leave out what the adapter trains beside the expert LoRA.

    Asked once for an optimizer: where it lacks any, all optimizers of the process are looked at.

    Raises:
        AttachError: routers, ``modules_to_save`` or dense LoRA are in no optimizer.
    """
    if not attached.options.auto_step or attached.paused:
        return
    lora = {id(p) for p in lora_parameters(attached)}
    wanted = {
        name: parameter
        for name, parameter in parameters_by_key(attached).items()
        if parameter.requires_grad and id(parameter) not in lora
    }
    missing = _not_held(wanted, optimizer)
    if missing:
        for other in [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]:
            missing = _not_held(missing, other)
    if missing:
        raise AttachError(
            f"the {type(optimizer).__name__} holds the expert LoRA of adapter {attached.name!r}, "
            f"but no optimizer holds {len(missing)} of the {len(wanted)} other parameters that the "
            f"adapter trains, first {next(iter(missing))!r}, which would not learn; right:\n"
            "    AdamW(adapter.parameters())\nor freeze them (requires_grad_(False)), or give them "
            "an optimizer of their own before this one steps"
        )


def _not_held(wanted: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, nn.Parameter]:
    groups = getattr(optimizer, "param_groups", ())  # there are none before its __init__ is over
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return {name: parameter for name, parameter in wanted.items() if id(parameter) not in held}


def _check_state_dtype(optimizer: Optimizer, parameter: nn.Parameter, before: torch.dtype) -> None:
    state = optimizer.state.get(parameter, {}).values()
    shaped = [v for v in state if isinstance(v, torch.Tensor) and v.shape == parameter.shape]
    if parameter.dtype != before and any(values.dtype == before for values in shaped):
        raise AttachError(
            f"the LoRA was cast from {before} to {parameter.dtype} after the "
            f"{type(optimizer).__name__} had made its state in {before}; cast the model before the "
            "optimizer is made, or make a new one now:\n"
            "    optimizer = AdamW(adapter.parameters())"
        )
