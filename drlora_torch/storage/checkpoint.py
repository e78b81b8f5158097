"""Save an adapter and load it again: weights, slot tables, engine state and options.

Tensors of a file, by layer: ``{layer}/{projection}/lora_A`` [P, I] and ``lora_B`` [P, O] (row s of
both belongs to slot s), ``{layer}/owner``, ``{layer}/position`` and ``{layer}/ages`` int64 [P]; the
engine's arrays as ``{layer}/engine/{field}``; routers that learn as ``router/{parameter}``; the
partial state of the current optimizer step as ``pending/...``, see
:meth:`drlora_torch.step.tracker.StepTracker.state_dict`. Of K growth events, also
``{layer}/events/deltas`` int64 [K, N], ``saliency`` float64 [K, N], and with policy ``prune``
``cut`` bool [K, N, R]; ranks follow from the deltas.

Shape letters: P rank slots, I and O input and output features, N experts, R = r_max.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drlora_core import AllocatorConfig, AllocatorEngine, GrowthEvent, LayoutError, Policy
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.residents import tracker_of
from drlora_torch.lifecycle.routers import trained_routers
from drlora_torch.models.records import MoELayer
from drlora_torch.options import AdapterOptions
from drlora_torch.step.parameters import unfreeze_routers
from drlora_torch.step.processes import several_processes
from drlora_torch.storage import adapter_file, checkpoint_checks, fingerprint
from drlora_torch.storage.checkpoint_checks import EVENT_FIELDS, Saved, as_checkpoint_error

VERSION = 2


def save(attached: Attached, path: Path) -> None:
    state = attached.engine.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, layer in attached.layers.items():
        table = layer.lora.table
        if (table.ranks() != attached.engine.ranks(name)).any():
            raise CheckpointError(
                f"layer {name!r} holds other ranks than the engine (was a growth event "
                "interrupted?); go on from the last file that was saved"
            )
        slots = {"owner": table.owner, "position": table.position, "ages": attached.ages[name]}
        tensors |= {f"{name}/{field}": torch.from_numpy(array) for field, array in slots.items()}
        tensors |= layer.lora.tensors()
        for field in EVENT_FIELDS:
            if attached.events and name in getattr(attached.events[0], field):
                arrays = np.stack([getattr(event, field)[name] for event in attached.events])
                tensors[f"{name}/events/{field}"] = torch.from_numpy(arrays)
        fields = state["layers"][name]
        for field, value in list(fields.items()):
            if isinstance(value, np.ndarray):
                tensors[f"{name}/engine/{field}"] = torch.from_numpy(fields.pop(field))
    tensors |= {f"router/{name}": values for name, values in trained_routers(attached).items()}
    tensors |= _pending(attached)
    records = [layer.record for layer in attached.layers.values()]
    description = {
        "version": VERSION,
        "options": attached.options.model_dump(mode="json"),
        "engine": state,
        "events": [
            {"step": e.step, "index": e.index, "unplaced": e.unplaced} for e in attached.events
        ],
        "skipped_steps": attached.skipped_steps,
        "base": fingerprint.of_model(attached.model, records),
        "layers": {
            record.name: {
                "num_experts": record.num_experts,
                "projections": {p: list(shape) for p, shape in record.projections.items()},
            }
            for record in records
        },
    }
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    adapter_file.write(path, whole, description)


def read(path: Path) -> Saved:
    """Read a file; refuse it if it is missing, damaged, foreign or of another version."""
    tensors, description = adapter_file.read(path)
    with as_checkpoint_error(path):
        version = description["version"]
        if version != VERSION or isinstance(version, bool):
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
            layers=dict(description["layers"]),
            options=AdapterOptions(**description["options"]),
            state=state,
            events=list(description.get("events", [])),
            base=description.get("base"),
            tensors=tensors,
            skipped_steps=int(description["skipped_steps"]),
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
    tensors = saved.tensors
    attached.skipped_steps = saved.skipped_steps
    attached.events[:] = events
    for name, layer in attached.layers.items():
        owner, position = tensors[f"{name}/owner"].numpy(), tensors[f"{name}/position"].numpy()
        layer.lora.load(owner, position, tensors)
        attached.ages[name] = tensors[f"{name}/ages"].numpy().copy()


@torch.no_grad()
def fill_routers(attached: Attached, saved: Saved) -> None:
    """Give an adapter that is in its model the router values of a file."""
    for name, values in trained_routers(attached).items():
        values.copy_(saved.tensors[f"router/{name}"])


def restore(attached: Attached, path: Path, *, check_base: bool) -> None:
    """Bring an adapter to a saved state, in place: parameters keep their identity."""
    saved = read(path)
    options = saved.options.model_copy(update={"layers": attached.options.layers})
    if options != attached.options or set(saved.layers) != set(attached.layers):
        raise CheckpointError(f"{path} was saved by an adapter with other options or layers")
    records = [layer.record for layer in attached.layers.values()]
    events = check(saved, restore_engine(saved), attached.model, records, check_base)
    try:
        attached.engine.load_state_dict(saved.state)
    except LayoutError as error:
        raise CheckpointError(f"{path} does not fit the adapter's engine: {error}") from error
    fill(attached, saved, events)
    fill_routers(attached, saved)
    if (tracker := tracker_of(attached)) is None:
        attached.unfinished = saved.pending
    else:
        unfreeze_routers(attached)
        tracker.load_state_dict(saved.pending)


def _pending(attached: Attached) -> dict[str, Tensor]:
    tracker = tracker_of(attached)
    found = attached.unfinished if tracker is None else tracker.state_dict()
    if found and several_processes():
        warnings.warn(
            "saved in the middle of an optimizer step: gradients of several processes are not "
            "saved, so resume from the beginning of the step",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}
    return found
