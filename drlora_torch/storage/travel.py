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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.residents import adapted_modules, child_name
from drlora_torch.lifecycle.trained import trained_values
from drlora_torch.lora import parts
from drlora_torch.lora.slots import FREE
from drlora_torch.step.parameters import (
    all_names,
    base_keys,
    check_in_place,
    dense_parameters,
    names_in,
    parameters_by_key,
)
from drlora_torch.storage import checkpoint, checkpoint_checks, fingerprint
from drlora_torch.storage.checkpoint_checks import SLOT_FIELDS, Saved

CHILD = "adapter_state"
DESCRIPTION = "description"
LENGTH = 8
JSON_BYTES, JSON_BYTES_OF_AN_EVENT = 2048, 96  # at the most: of the whole, of a layer; of an event
WHERE = Path("the state dict")  # named in errors


class AdapterState(nn.Module):
    """Carries what a state dict has to hold of an adapter beside A and B; it has no forward."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self._attached = weakref.ref(attached)
        self._given: tuple[Tensor, int] | None = None  # the last one given, and its version
        self._base: dict[str, Any] | None = None
        self.read_base(attached)

    def get_extra_state(self) -> Tensor:
        """A safetensors file in memory, uint8 [bytes]."""
        self.settle()
        attached = self._attached()
        assert attached is not None, "the LoRA lives no longer than its adapter"
        checkpoint.check_values(attached)
        given = pack(attached, self._base)
        self._given = given, given._version
        return given

    def read_base(self, attached: Attached) -> None:
        """Read the fingerprint of the frozen base; None if its weights cannot be read.

        Now, and not when the state dict is asked for: processes may hold the base together, and
        one of them may ask alone.
        """
        records = [layer.record for layer in attached.layers.values()]
        self._base = fingerprint.of_readable(attached.model, records)

    def settle(self, *_: object) -> None:
        """Take a state that was written into the one given, and so into the rows, in place.

        Checkpoints of torch.distributed and averages of weights are loaded like that.

        Raises:
            CheckpointError: it does not fit; again at every use, until a state that fits is loaded.
        """
        attached, written = self._attached(), self._given
        if attached is None or written is None or written[0]._version == written[1]:
            return
        self._given = None  # the state dict below asks again
        try:
            prefix, state = "", dict(attached.model.state_dict())
            state[_key_of(attached, prefix)] = written[0]
            taken = _trained_keys(attached, state, prefix)
            saved = _read(attached, state, prefix, taken)
            checked = checkpoint.check_restorable(attached, saved, check_base=False)
        except BaseException:
            self._given = written
            raise
        self._given = None
        checkpoint.commit(attached, checked)

    def forget(self) -> None:
        """Forget what was given: another state takes its place."""
        self._given = None

    def set_extra_state(self, state: Any) -> None:
        """Taken by the model's own hooks, together with the rows."""


def pack(attached: Attached, base: dict[str, Any] | None) -> Tensor:
    """Everything of an adapter that is no parameter of the model, as bytes, uint8 [bytes].

    The size does not change while the adapter trains: a checkpoint may be read into the state dict
    of a fresh adapter, in place. Its first 8 bytes are the length of what counts.
    """
    tensors, description = checkpoint.describe(attached)
    description["base"] = base  # the fingerprint
    if not attached.trained_shown:
        keys = base_keys(attached)
        for name, value in trained_values(attached).items():
            tensors[keys[name]] = parts.whole(value)
    tensors[DESCRIPTION] = _as_bytes(json.dumps(description).encode())
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    content = safetensors.save(held)
    size = len(content).to_bytes(LENGTH, "little")
    return _as_bytes((size + content).ljust(_capacity(attached), b"\0"))


def _capacity(attached: Attached) -> int:
    """Bytes that an adapter may need, once all its events have happened."""
    config = attached.engine.config
    events, dimensions = config.num_events, config.r_max * config.cuts
    size = JSON_BYTES + events * JSON_BYTES_OF_AN_EVENT + len(attached.options.model_dump_json())
    for name, layer in attached.layers.items():
        experts, slots = layer.record.num_experts, layer.lora.table.num_slots
        of_engine = experts * 8 * (4 + dimensions)  # ranks, f, g, counts; s_j where they are cut
        of_event = experts * (8 * 3 + dimensions)
        size += 3 * 8 * slots + of_engine + events * of_event + JSON_BYTES + 16 * len(name)
    size += len(json.dumps(list(attached.dense))) + len(attached.dense)
    for value in trained_values(attached).values() if not attached.trained_shown else ():
        size += value.numel() * value.element_size()
    return size


def unpack(state: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays and the description of :func:`pack`."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        found = f"{state.dtype}{list(state.shape)}" if isinstance(state, Tensor) else type(state)
        raise CheckpointError(
            f"the adapter in the state dict is {found}, not the bytes (uint8) that state_dict() "
            "gave; average only floating-point values, and load all files of a checkpoint at once"
        )
    try:
        content = state.cpu().numpy().tobytes()
        length = int.from_bytes(content[:LENGTH], "little")
        tensors = safetensors.load(content[LENGTH : LENGTH + length])
        description = json.loads(tensors.pop(DESCRIPTION).numpy().tobytes())
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the adapter in the state dict is damaged: {error}") from error
    return tensors, description


def follow_state_dict(attached: Attached) -> Callable[[], None]:
    """Let an adapter that enters its model travel in the model's state dict; return the undo."""
    with contextlib.ExitStack() as undo:
        lora = next(iter(attached.layers.values())).lora
        carrier = AdapterState(attached)
        lora.add_module(CHILD, carrier)
        undo.callback(lora._modules.pop, CHILD)
        undo.callback(attached.model.register_forward_pre_hook(carrier.settle).remove)
        loading = _Loading(attached, carrier)
        undo.callback(loading.remove)
        return undo.pop_all().close


def settle(attached: Attached) -> None:
    """Take a state that was written into the model's state dict in place, before it is used."""
    for carrier in _carriers(attached):
        carrier.settle()


def forget(attached: Attached) -> None:
    """Forget such a state: the adapter has been brought to another one."""
    for carrier in _carriers(attached):
        carrier.forget()


def _carriers(attached: Attached) -> Iterator[AdapterState]:
    for layer in attached.layers.values():
        yield from (child for child in layer.lora.children() if isinstance(child, AdapterState))


class _Loading:
    """Takes part in the model's ``load_state_dict``."""

    def __init__(self, attached: Attached, carrier: AdapterState) -> None:
        self._attached = weakref.ref(attached)
        self._carrier = carrier
        self._prefix = ""  # of the model in the state that is being loaded
        self._checked: checkpoint.Checked | None = None
        self._complete: set[str] = set()  # keys that may be missing
        self._alone = True  # without weights of the base
        model: Any = attached.model  # torch has no types for these methods
        self._handles: list[RemovableHandle] = [
            model.register_load_state_dict_pre_hook(self._before),
            model.register_load_state_dict_post_hook(self._after),
        ]
        for layer in attached.layers.values():
            lora: Any = layer.lora
            self._handles.append(lora.register_load_state_dict_pre_hook(self._inside))
        for holder in _holders(attached):
            self._handles.append(holder.register_load_state_dict_pre_hook(_keep_parameters))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Check the whole state before anything of the model is loaded."""
        attached, self._checked, self._prefix = self._attached(), None, prefix
        if attached is None:
            return
        places = tuple(f"{prefix}{name}." for name in attached.layers)
        ours = tuple(f"{place}{child_name(attached.name)}." for place in places)
        if not any(key.startswith(places) for key in state):
            return
        check_in_place(attached)
        if not any(key.startswith(ours) for key in state):
            raise CheckpointError(
                f"the state dict has other weights of the experts, but not adapter "
                f"{attached.name!r} of this model, which would go on unchanged; to bring a saved "
                "adapter back: adapter.restore(path), or "
                "Trainer(..., callbacks=[DRLoRACallback(adapter)]); to load other weights of the "
                "base: detach() first"
            )
        self._carrier.forget()
        alone = self._alone = not any(_is_of_base(key, places) for key in state)
        taken = _trained_keys(attached, state, prefix)
        saved = _read(attached, state, prefix, taken)
        self._checked = checkpoint.check_restorable(attached, saved, check_base=alone)
        learning = {f"{prefix}{n}" for n, p in module.named_parameters() if p.requires_grad}
        frozen = {f"{prefix}{key}" for key in module.state_dict()} - learning if alone else set()
        self._complete = frozen | set(taken)
        for key in taken:  # they go where the trained values are, which may not be in the model
            del state[key]

    def _inside(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        attached = self._attached()
        if attached is None or not any(key.startswith(prefix) for key in state):
            return
        whole = {f"{self._prefix}{name}.{child_name(attached.name)}." for name in attached.layers}
        if self._checked is None or prefix not in whole:
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
        if not self._alone:
            self._carrier.read_base(attached)
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if key not in self._complete]


def _trained_keys(attached: Attached, state: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Keys of a state that hold trained values of base parameters, and these names in files.

    A shared parameter may be there by any of its names.
    """
    keys = base_keys(attached)
    return {
        prefix + alias: keys[name]
        for name, aliases in all_names(attached).items()
        for alias in aliases
        if prefix + alias in state
    }


def _key_of(attached: Attached, prefix: str) -> str:
    """The key of an adapter's extra state."""
    return f"{prefix}{next(iter(attached.layers))}.{child_name(attached.name)}.{CHILD}._extra_state"


def _read(
    attached: Attached, state: Mapping[str, Any], prefix: str, taken: dict[str, str]
) -> Saved:
    """Take an adapter from a state dict, as if it came from a file; see :func:`collect`."""
    return checkpoint.parse(WHERE, *collect(attached, state, prefix, taken))


def content(attached: Attached, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the description of a file, from a state dict of the whole model."""
    own = _key_of(attached, "")
    prefixes = [key.removesuffix(own) for key in state if key.endswith(own)]
    prefix = prefixes[0] if prefixes else ""  # of a model around it, such as a PeftModel
    return collect(attached, state, prefix, _trained_keys(attached, state, prefix))


def collect(
    attached: Attached, state: Mapping[str, Any], prefix: str, taken: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect what a file would hold from a state dict.

    ``taken`` loses the keys whose values are those of the base: the state was saved while another
    adapter was in the model, or none.
    """
    child, key = child_name(attached.name), _key_of(attached, prefix)
    if key not in state:
        raise CheckpointError(
            f"the state dict has rows of the LoRA, but not whose they are: it lacks {key!r} (was "
            "it saved by an older drlora, filtered, or is it one file of several?)"
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
        for own, aliases in names_in(attached.model, dense_parameters(attached)).items():
            for full in (prefix + alias for alias in aliases if prefix + alias in state):
                tensors[own] = state[full]
        elsewhere = {own for own in taken.values() if own in tensors}
        for key, own in list(taken.items()):
            if own in elsewhere:
                del taken[key]
            else:
                tensors[own] = state[key]
    return tensors, description


def _holders(attached: Attached) -> list[Any]:
    """Modules that hold a parameter which learns, and so has to stay the same object."""
    learning = {id(p) for p in parameters_by_key(attached).values()}
    loras = [lora for _, lora in adapted_modules(attached)]
    candidates = [*attached.model.modules(), *(part for lora in loras for part in lora.modules())]
    holders = {id(m): m for m in candidates if any(id(p) in learning for p in m.parameters(False))}
    return list(holders.values())


def _keep_parameters(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Copy also with ``assign=True``: the optimizer holds these parameters."""
    metadata["assign_to_params_buffers"] = False


def _is_of_base(key: str, places: Iterable[str]) -> bool:
    """True for a weight of adapted experts that is no LoRA."""
    for place in places:
        if key.startswith(place):
            return not key[len(place) :].startswith("drlora")
    return False


def _as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
