"""The adapter in ``model.state_dict()``, which Accelerate, Trainer and EMA copies carry around.

A and B are parameters of the model, so they are in there anyway; which expert owns which row, the
engine and the ages of newborn rows come along as the extra state of a small module beside the LoRA
of the first layer. ``load_state_dict`` takes all of it or none: a state that does not fit is
refused before anything is loaded. The partial state of a step is left out, as gradients are.

Shape letters: P rank slots.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.residents import child_name
from drlora_torch.lifecycle.trained import trained_values
from drlora_torch.lora.slots import FREE
from drlora_torch.step.parameters import base_keys, base_parameters
from drlora_torch.storage import checkpoint, checkpoint_checks
from drlora_torch.storage.checkpoint_checks import SLOT_FIELDS, Saved

CHILD = "adapter_state"
DESCRIPTION = "description"
WHERE = Path("the state dict")  # named in errors


class AdapterState(nn.Module):
    """Carries what a state dict has to hold of an adapter beside A and B; it has no forward."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self._attached = weakref.ref(attached)

    def get_extra_state(self) -> Tensor:
        """A safetensors file in memory, uint8 [bytes]."""
        attached = self._attached()
        assert attached is not None, "the LoRA lives no longer than its adapter"
        return pack(attached)

    def set_extra_state(self, state: Any) -> None:
        """Taken by the model's own hooks, together with the rows."""


def pack(attached: Attached) -> Tensor:
    """Everything of an adapter that is no parameter of the model, as bytes, uint8 [bytes]."""
    tensors, description = checkpoint.describe(attached)
    if not attached.trained_shown:
        keys = base_keys(attached)
        tensors |= {keys[name]: value for name, value in trained_values(attached).items()}
    tensors[DESCRIPTION] = _as_bytes(json.dumps(description).encode())
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return _as_bytes(safetensors.save(held))


def unpack(state: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays and the description of :func:`pack`."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise CheckpointError("the adapter in the state dict cannot be read")
    try:
        tensors = safetensors.load(state.cpu().numpy().tobytes())
        description = json.loads(tensors.pop(DESCRIPTION).numpy().tobytes())
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the adapter in the state dict is damaged: {error}") from error
    return tensors, description


def follow_state_dict(attached: Attached) -> Callable[[], None]:
    """Let an adapter that enters its model travel in the model's state dict; return the undo."""
    with contextlib.ExitStack() as undo:
        lora = next(iter(attached.layers.values())).lora
        lora.add_module(CHILD, AdapterState(attached))
        undo.callback(lora._modules.pop, CHILD)
        loading = _Loading(attached)
        undo.callback(loading.remove)
        return undo.pop_all().close


class _Loading:
    """Takes part in the model's ``load_state_dict``."""

    def __init__(self, attached: Attached) -> None:
        self._attached = weakref.ref(attached)
        self._checked: checkpoint.Checked | None = None
        self._partial = False  # True for a state dict without the base
        model: Any = attached.model  # torch has no types for these methods
        self._handles: list[RemovableHandle] = [
            model.register_load_state_dict_pre_hook(self._before),
            model.register_load_state_dict_post_hook(self._after),
        ]
        for layer in attached.layers.values():
            lora: Any = layer.lora
            slots = list(lora.projections.values())
            self._handles.append(lora.register_load_state_dict_pre_hook(self._inside))
            self._handles += [s.register_load_state_dict_pre_hook(_keep_parameters) for s in slots]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Check the whole state before anything of the model is loaded."""
        attached, self._checked = self._attached(), None
        if attached is None:
            return
        places = [f"{prefix}{name}." for name in attached.layers]
        ours = tuple(f"{place}{child_name(attached.name)}." for place in places)
        of_base = any(_is_of_base(key, places) for key in state)
        if any(key.startswith(ours) for key in state):
            if not attached.enabled and base_parameters(attached):
                raise CheckpointError(
                    "a state dict cannot be loaded inside adapter.disabled(): trained parameters "
                    "of the base would take the place of its own; load it outside"
                )
            saved = _read(attached, state, prefix)
            self._checked = checkpoint.check_restorable(attached, saved, check_base=False)
            self._partial = not of_base
        elif of_base:
            raise CheckpointError(
                f"the state dict has the experts of the base model, but not adapter "
                f"{attached.name!r} of this model, which would go on unchanged; to bring a saved "
                "adapter back: adapter.restore(path), or "
                "Trainer(..., callbacks=[DRLoRACallback(adapter)]); to load other weights of the "
                "base: detach() first"
            )

    def _inside(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if self._checked is None and any(key.startswith(prefix) for key in state):
            raise CheckpointError(
                "the LoRA of a part of the model cannot be loaded alone: its rows belong to the "
                "ranks of the whole adapter; call load_state_dict of the whole model"
            )

    def _after(self, module: nn.Module, incompatible: Any) -> None:
        """Take the rest of the adapter, now that its rows are there."""
        attached, checked, self._checked = self._attached(), self._checked, None
        if attached is None or checked is None:
            return
        checkpoint.commit(attached, checked)
        if self._partial:  # a state dict of the adapter alone is complete
            learning = {n for n, p in module.named_parameters() if p.requires_grad}
            kept = [key for key in incompatible.missing_keys if key in learning]
            incompatible.missing_keys[:] = kept


def _read(attached: Attached, state: Mapping[str, Any], prefix: str) -> Saved:
    """Collect an adapter from a state dict, as if it came from a file."""
    child = child_name(attached.name)
    first = next(iter(attached.layers))
    key = f"{prefix}{first}.{child}.{CHILD}._extra_state"
    if key not in state:
        raise CheckpointError(
            f"the state dict has rows of the LoRA, but not whose they are: it lacks {key!r} (was "
            "it saved by an older drlora, or filtered?)"
        )
    tensors, description = unpack(state[key])
    with checkpoint_checks.as_checkpoint_error(WHERE):
        for name in description["layers"]:
            owned = tensors[f"{name}/{SLOT_FIELDS[0]}"] != FREE
            rows = f"{prefix}{name}.{child}.projections."
            for full, value in state.items():
                if full.startswith(rows):
                    own = f"{name}/{full.removeprefix(rows).replace('.', '/')}"
                    # An average of weights over steps leaves values in slots that were freed.
                    fits = value.dim() == 2 and len(value) == len(owned)
                    tensors[own] = checkpoint.keep_rows(value, owned) if fits else value
        for name, own in base_keys(attached).items():
            if own not in tensors and prefix + name in state:
                tensors[own] = state[prefix + name]
    return checkpoint.parse(WHERE, tensors, description)


def _keep_parameters(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Copy into A and B also with ``assign=True``: the optimizer holds these parameters."""
    metadata["assign_to_params_buffers"] = False


def _is_of_base(key: str, places: Iterable[str]) -> bool:
    """True for a weight of adapted experts that is no LoRA."""
    for place in places:
        if key.startswith(place):
            return not key[len(place) :].startswith("drlora")
    return False


def _as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
