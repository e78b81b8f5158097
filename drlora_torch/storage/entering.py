"""Put an adapter into its model so that it is saved and loaded wherever the model is."""

from __future__ import annotations

import contextlib

from torch import nn

from drlora_torch.attached import Attached
from drlora_torch.lifecycle.residents import Residents
from drlora_torch.models.wrappers import peft_models
from drlora_torch.storage.saving import follow_saves
from drlora_torch.storage.travel import follow_state_dict


def enter(residents: Residents, attached: Attached, holder: nn.Module | None = None) -> None:
    """Add an adapter to its model; a failure leaves no trace.

    Args:
        residents: the adapters of the model.
        attached: the new one.
        holder: the model as the user holds it, say a PeftModel; default: the model itself.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(follow_state_dict(attached))
        residents.add(attached)
        residents.undo_with(attached, undo.pop_all().close)
    residents.undo_with(None, follow_saves(residents.model, residents.model))
    if holder is not None:
        save_beside(residents.model, holder)


def save_beside(model: nn.Module, holder: nn.Module) -> None:
    """Write the adapters of a model wherever a PeftModel around it is saved, and load them there.

    Args:
        model: the adapted model.
        holder: the model as the user holds it, in any wrappers.
    """
    residents = Residents.of(model)
    for outer in peft_models(holder):
        residents.undo_with(None, follow_saves(model, outer))
        for attached in residents.by_name.values():
            attached.saved_by_peft = True
