"""Save an adapter and load it again: weights, slot tables, engine state and options.

Tensors of a file, by layer: ``{layer}/{projection}/lora_A`` [P, I] and ``lora_B`` [P, O] (row s of
both belongs to slot s), ``{layer}/owner``, ``{layer}/position`` and ``{layer}/ages`` int64 [P]; the
engine's arrays as ``{layer}/engine/{field}``; routers that learn as ``router/{parameter}``, and
``modules_to_save`` as ``module/{parameter}``; the LoRA of other Linears (``attention_rank``), which
the description lists, as ``dense/{Linear}/lora_A`` [R, I] and ``lora_B`` [O, R]; the partial state
of the current optimizer step as ``pending/...``, see :mod:`drlora_torch.step.pending`. Of K growth
events, also ``{layer}/events/deltas`` int64 [K, N], ``saliency`` float64 [K, N], and with the
policies ``prune`` and ``move`` ``cut`` bool [K, N, R]; ranks follow from the deltas.

Shape letters: P rank slots, I and O input and output features, N experts, R = r_max, or the rank of
Linears.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drlora_core import AllocatorConfig, AllocatorEngine, GrowthEvent, LayoutError, Policy
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.residents import tracker_of
from drlora_torch.lifecycle.trained import trained_values
from drlora_torch.lora import parts
from drlora_torch.lora.slots import FREE
from drlora_torch.models.records import MoELayer
from drlora_torch.options import AdapterOptions
from drlora_torch.step import growth
from drlora_torch.step.parameters import base_keys, check_in_place, dense_parameters
from drlora_torch.step.processes import several_processes
from drlora_torch.step.sharded import free_gathered, together, writes
from drlora_torch.storage import adapter_file, checkpoint_checks, fingerprint, finite
from drlora_torch.storage.checkpoint_checks import EVENT_FIELDS, Saved, as_checkpoint_error

VERSION = 2


def save(attached: Attached, path: Path) -> None:
    """Write the whole adapter to a folder; values of slots that nobody owns are written as 0.

    Processes that hold the adapter together must all call, and the first one writes. Where each
    holds it whole, each that calls writes.
    """
    check_in_place(attached)
    with together(attached, "save_pretrained"):
        _save(attached, path)


def _save(attached: Attached, path: Path) -> None:
    check_values(attached)
    try:
        growth.check_ranks(attached)
    except LayoutError as error:
        raise CheckpointError(str(error)) from error
    tensors, description = describe(attached)
    here = writes(attached)
    for key, values in _weights(attached):
        finite.check_weights(key, values)
        if here:
            tensors[key] = values.cpu().contiguous()
    records = [layer.record for layer in attached.layers.values()]
    description["base"] = fingerprint.of_readable(attached.model, records)
    if here:
        pending = {
            k: values.detach().cpu().contiguous() for k, values in _pending(attached).items()
        }
        adapter_file.write(path, tensors | pending, description)


def write(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write the content of a file that was put together elsewhere."""
    for key, values in tensors.items():
        if values.is_floating_point():
            finite.check_weights(key, values)
    held = {key: values.detach().cpu().contiguous() for key, values in tensors.items()}
    adapter_file.write(path, held, description)


def check_finite(attached: Attached) -> None:
    """Refuse to write what is trained, in whatever form, if it has diverged."""
    for key, values in _weights(attached):
        finite.check_weights(key, values)


def _weights(attached: Attached) -> Iterator[tuple[str, Tensor]]:
    """All that the adapter trains, whole, by their keys in files; one after the other."""
    for layer in attached.layers.values():
        owned = torch.from_numpy(layer.lora.table.owner != FREE)
        for key, parameter in layer.lora.tensors().items():
            # An average of the weights over steps (EMA) leaves values in slots that were freed.
            yield key, keep_rows(parts.whole(parameter), owned)
    for key, parameter in dense_parameters(attached).items():
        yield key, parts.whole(parameter)
    keys = base_keys(attached)
    for name, values in trained_values(attached).items():
        yield keys[name], parts.whole(values)


def describe(attached: Attached) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds beside weights: arrays, and values for JSON."""
    state = attached.engine.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, layer in attached.layers.items():
        table = layer.lora.table
        slots = {"owner": table.owner, "position": table.position, "ages": attached.ages[name]}
        tensors |= {f"{name}/{field}": torch.from_numpy(array) for field, array in slots.items()}
        for field in EVENT_FIELDS:
            if attached.events and name in getattr(attached.events[0], field):
                arrays = np.stack([getattr(event, field)[name] for event in attached.events])
                tensors[f"{name}/events/{field}"] = torch.from_numpy(arrays)
        fields = state["layers"][name]
        for field, value in list(fields.items()):
            if isinstance(value, np.ndarray):
                tensors[f"{name}/engine/{field}"] = torch.from_numpy(fields.pop(field))
    records = [layer.record for layer in attached.layers.values()]
    return tensors, {
        "version": VERSION,
        "name": attached.name,
        "options": attached.options.model_dump(mode="json"),
        "engine": state,
        "events": [
            {"step": e.step, "index": e.index, "unplaced": e.unplaced} for e in attached.events
        ],
        "skipped_steps": attached.skipped_steps,
        "layers": {
            record.name: {
                "num_experts": record.num_experts,
                "projections": {p: list(shape) for p, shape in record.projections.items()},
            }
            for record in records
        },
        "dense": list(attached.dense),
    }


def keep_rows(values: Tensor, kept: Tensor) -> Tensor:
    """Values [P, ...] with 0 in every row that is not kept, bool [P]; not a copy if all are."""
    if parts.is_sharded(values):
        copy = values.clone()
        parts.local(copy)[~kept[parts.held_rows(values)]] = 0.0
        return copy
    kept = kept.to(values.device)
    return values if kept.all() else values.masked_fill(~kept.unsqueeze(-1), 0.0)


def read(path: Path) -> Saved:
    """Read a file; refuse it if it is missing, damaged, foreign or of another version."""
    return parse(path, *adapter_file.read(path))


def parse(path: Path, tensors: dict[str, Tensor], description: Mapping[str, Any]) -> Saved:
    """Take the content of a file, which is named in errors, apart."""
    with as_checkpoint_error(path):
        version = description["version"]
        if version != VERSION or type(version) is not int:
            raise CheckpointError(
                f"the adapter has format version {version!r}; this drlora reads {VERSION} (a newer "
                "file needs a newer drlora)"
            )
        state = dict(description["engine"])
        state["layers"] = {name: dict(fields) for name, fields in state["layers"].items()}
        for key, tensor in tensors.items():
            name, _, field = key.rpartition("/engine/")
            if name:
                state["layers"][name][field] = tensor.numpy()
        return Saved(
            path=path,
            name=str(description.get("name", "default")),
            layers=dict(description["layers"]),
            dense=checkpoint_checks.names(description.get("dense", [])),
            options=AdapterOptions(**description["options"]),
            state=state,
            events=list(description.get("events", [])),
            base=description["base"],
            tensors=tensors,
            skipped_steps=checkpoint_checks.count(description["skipped_steps"], "skipped_steps"),
        )


def restore_engine(saved: Saved, policy: Policy | None = None) -> AllocatorEngine:
    with as_checkpoint_error(saved.path):
        config = AllocatorConfig.model_validate(saved.state["config"])
        engine = AllocatorEngine(config, policy=policy)
        engine.load_state_dict(saved.state)
        return engine


def check(
    saved: Saved,
    engine: AllocatorEngine,
    model: torch.nn.Module,
    found: Sequence[MoELayer],
    check_base: bool,
) -> list[GrowthEvent]:
    """Check a file and its engine against a model and its layers; return the growth events.

    ``check_base`` compares the fingerprint of the base's expert weights too.
    """
    records = {record.name: record for record in found}
    with as_checkpoint_error(saved.path):
        checkpoint_checks.check_layers(saved, records)
        if check_base:
            fingerprint.check(model, records, saved.base)
        checkpoint_checks.check_tensors(saved, engine, model, records)
        checkpoint_checks.check_slots(saved, engine)
        return checkpoint_checks.checked_events(saved, engine)


@torch.no_grad()
def fill(attached: Attached, saved: Saved, events: list[GrowthEvent]) -> None:
    """Give an adapter the checked content of a file, but not the partial state of a step."""
    free_gathered(attached)
    tensors = saved.tensors
    attached.skipped_steps = saved.skipped_steps
    attached.events[:] = events
    for name, layer in attached.layers.items():
        owner, position = tensors[f"{name}/owner"].numpy(), tensors[f"{name}/position"].numpy()
        layer.lora.load(owner, position, tensors)
        attached.ages[name] = tensors[f"{name}/ages"].numpy().copy()
    for key, parameter in dense_parameters(attached).items():
        parts.write(parameter, tensors[key])
    attached.missed.clear()


@torch.no_grad()
def fill_trained(attached: Attached, saved: Saved) -> None:
    """Give an adapter that is in its model the trained values of base parameters in a file."""
    keys = base_keys(attached)
    for name, values in trained_values(attached).items():
        parts.write(values, saved.tensors[keys[name]])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """A saved state that an adapter can be brought to."""

    saved: Saved
    events: list[GrowthEvent]


def restore(attached: Attached, path: Path, *, check_base: bool) -> None:
    """Bring an adapter to a saved state, in place: parameters keep their identity."""
    with together(attached, "restore", in_step=False):
        saved = read(path)
    with together(attached, "restore", in_step=False):
        checked = check_restorable(attached, saved, check_base=check_base)
    commit(attached, checked)


def check_restorable(attached: Attached, saved: Saved, *, check_base: bool) -> Checked:
    """Check everything that could stop an adapter from taking a saved state."""
    chosen = {"layers", "attention_targets"}  # what they chose is compared
    own, theirs = (o.model_dump(exclude=chosen) for o in (attached.options, saved.options))
    differing = [f"{field} {theirs[field]!r}" for field in own if own[field] != theirs[field]]
    if set(saved.layers) != set(attached.layers):
        differing.append("layers")
    if set(saved.dense) != set(attached.dense):
        differing.append("attention_targets")
    if differing:
        raise CheckpointError(
            f"{saved.path} was saved by an adapter with other options or layers: "
            f"{', '.join(differing)}; attach with the same ones"
        )
    records = [layer.record for layer in attached.layers.values()]
    events = check(saved, restore_engine(saved), attached.model, records, check_base)
    trial = AllocatorEngine(attached.engine.config)
    for name in attached.engine.layer_names:
        trial.add_layer(name, attached.engine.num_experts(name))
    try:
        trial.load_state_dict(saved.state)
    except LayoutError as error:
        raise CheckpointError(f"{saved.path} does not fit the adapter's engine: {error}") from error
    return Checked(saved, events)


def commit(attached: Attached, checked: Checked) -> None:
    """Take a state that was checked."""
    saved = checked.saved
    with attached.engine.driver.acting():
        attached.engine.load_state_dict(saved.state)
    fill(attached, saved, checked.events)
    fill_trained(attached, saved)
    if (tracker := tracker_of(attached)) is None:
        attached.unfinished = saved.pending
    else:
        tracker.load_state_dict(saved.pending)


def check_values(attached: Attached) -> None:
    """Refuse to save a LoRA that is gone."""
    if any(p.is_meta for layer in attached.layers.values() for p in layer.lora.matrices()):
        raise CheckpointError(
            "the adapted model was moved to the meta device, which loses the LoRA; if "
            "Accelerate did it: set fsdp_cpu_ram_efficient_loading to false"
        )


def _pending(attached: Attached) -> dict[str, Tensor]:
    """The partial state of a step; gradients that overflowed too, so that it is skipped again."""
    tracker = tracker_of(attached)
    found = attached.unfinished if tracker is None else tracker.state_dict()
    if found and several_processes(attached.process_group):
        warnings.warn(
            "saved in the middle of an optimizer step: gradients of several processes are not "
            "saved, so resume from the beginning of the step",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}
    return found
