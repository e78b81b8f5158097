"""An adapter file as it was read, and what must hold of it before anything is loaded from it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from drlora_core import AllocatorEngine, GrowthEvent
from drlora_core.errors import describe_validation_error
from drlora_core.snapshot import MOST_STEPS
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.modules import choose_modules
from drlora_torch.lora import parts
from drlora_torch.lora.slots import FREE, Layout
from drlora_torch.models.records import MoELayer
from drlora_torch.options import AdapterOptions, RouterMode
from drlora_torch.signals import Importance, Routing, choose_importance, choose_routing
from drlora_torch.step.parameters import base_key, join_base
from drlora_torch.step.pending import GRADIENT, IMPORTANCE, ROUTING
from drlora_torch.storage.finite import DIVERGED, is_finite

SLOT_FIELDS = ("owner", "position", "ages")
EVENT_COUNTS = ("step", "index", "unplaced")
EVENT_FIELDS = {
    "deltas": torch.int64,
    "ranks": torch.int64,
    "saliency": torch.float64,
    "cut": torch.bool,
}
Wanted = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shape and dtype of tensors in a file by name; None for any floating-point dtype."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """The content of a file whose description was read; its tensors are not checked yet."""

    path: Path
    name: str  # of the adapter
    layers: Mapping[str, Any]
    dense: tuple[str, ...]  # names of Linears beside the experts
    options: AdapterOptions
    state: Mapping[str, Any]  # of the engine
    events: Sequence[Mapping[str, Any]]
    base: object  # the fingerprint of the base model
    tensors: Mapping[str, Tensor]
    skipped_steps: int

    @property
    def pending(self) -> dict[str, Tensor]:
        """Partial state of the step in which the file was saved."""
        return {key: t for key, t in self.tensors.items() if key.startswith("pending/")}


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turn what damaged values raise into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path} is not a complete adapter: it lacks {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is not a complete adapter: {error!r}") from error
    except ValidationError as error:
        what = describe_validation_error(error)
        raise CheckpointError(f"{path} cannot be loaded: {what}") from error
    except ValueError as error:  # DRLoRAError among them
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def find_signals(
    saved: Saved, importance: object, routing: object, *, needed: bool
) -> dict[str, Importance | Routing]:
    """The signals of a file, with those of the user's own as they are given again.

    Args:
        saved: the file.
        importance: a name or callable; None: not given.
        routing: likewise.
        needed: False if nothing will be measured.

    Raises:
        CheckpointError: one is missing, or another was given.
    """
    choices = (
        (saved.options.importance, importance, choose_importance),
        (saved.options.routing, routing, choose_routing),
    )
    found: dict[str, Importance | Routing] = {}
    for own, given, choose in choices:
        kind = own.kind
        chosen: Importance | Routing = own if given is None else choose(given)
        if str(chosen) != str(own):
            raise CheckpointError(
                f"{saved.path} was trained with the {kind} signal {own.name!r}, not "
                f"{chosen.name!r}" + ("" if own.own else f"; leave {kind} out")
            )
        if needed and chosen.function is None:
            raise CheckpointError(
                f"{saved.path} was trained with your own {kind} signal {own.name!r}, whose "
                f"code is not saved: load(model, path, {kind}={own.name}) goes on with it, and "
                "load(model, path, trainable=False) needs none"
            )
        found[kind] = chosen
    return found


def names(value: object) -> tuple[str, ...]:
    """A list of names in a description."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"a list of names cannot be read: {value!r}")
    return tuple(value)


def count(value: object, what: str) -> int:
    """A step or a count in a description."""
    if type(value) is not int or not 0 <= value <= MOST_STEPS:
        raise CheckpointError(
            f"{what} is {reprlib.repr(value)}; accepted: whole numbers from 0 to {MOST_STEPS:,}"
        )
    return value


def check_layers(saved: Saved, records: Mapping[str, MoELayer]) -> None:
    """The model has the layers of the file, with its experts and projections."""
    for name, layer in saved.layers.items():
        if name not in records:
            raise CheckpointError(f"the adapter has a layer {name!r} that the model does not have")
        shapes = {p: list(shape) for p, shape in records[name].projections.items()}
        for what, own, theirs in (
            ("experts", records[name].num_experts, layer["num_experts"]),
            ("projections", shapes, layer["projections"]),
        ):
            if own != theirs:
                raise CheckpointError(
                    f"layer {name!r}: the model has {own} {what}, the adapter is for {theirs}"
                )


def check_tensors(
    saved: Saved, engine: AllocatorEngine, model: nn.Module, records: Mapping[str, MoELayer]
) -> None:
    """Every wanted tensor is there, with its shape and dtype; no unknown one; all are finite.

    The partial state of a step may be there too, and may hold any value: after an overflow its
    step must be skipped.
    """
    wanted = _wanted_tensors(saved, engine, model, records)
    found = {key: tensor for key, tensor in saved.tensors.items() if "/engine/" not in key}
    optional = {key: each for key, each in _partial_state(wanted, saved).items() if key in found}
    expected = wanted | optional
    if differing := sorted(expected.keys() ^ found.keys()):
        verb = "lacks" if differing[0] in wanted else "has an unknown"
        raise CheckpointError(f"the adapter {verb} tensor {differing[0]!r}")
    for key, (shape, dtype) in expected.items():
        tensor = found[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}, not {shape}")
        if not (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype):
            raise CheckpointError(f"{key} has a wrong dtype, {tensor.dtype}")
        if key in wanted and not (is_finite if dtype is None else _is_number)(tensor):
            raise CheckpointError(f"{key} holds {DIVERGED}")
        if key.startswith(ROUTING) and ((tensor < 0).any() or tensor[-1] % 1 != 0):
            raise CheckpointError(f"{key} holds counts that are impossible")


def _is_number(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def check_slots(saved: Saved, engine: AllocatorEngine) -> None:
    """The slot tables hold exactly the ranks of the engine, each dimension once."""
    if set(engine.layer_names) != set(saved.layers):
        raise CheckpointError("the saved engine is of other layers than the adapter")
    masked = saved.options.layout is Layout.MASKED
    for name in engine.layer_names:
        owner, position, ages = (saved.tensors[f"{name}/{field}"].numpy() for field in SLOT_FIELDS)
        held = owner != FREE
        owned = sorted(zip(owner[held].tolist(), position[held].tolist(), strict=True))
        wanted = [(e, j) for e, rank in enumerate(engine.ranks(name).tolist()) for j in range(rank)]
        reserved = np.flatnonzero(held) // engine.config.r_max
        for wrong, what in (
            (engine.is_observed(name), "it was saved in the middle of engine.step()"),
            (owned != wanted, "the slot table does not hold the saved ranks"),
            (masked and (owner[held] != reserved).any(), "a slot is in another expert's range"),
            (ages.min() < -1 or (ages[~held] != -1).any(), "ages of slots are impossible"),
        ):
            if wrong:
                raise CheckpointError(f"layer {name!r}: {what}")
        free = torch.from_numpy(~held)
        for key in _lora_shapes(saved, name):
            values = saved.tensors[key]
            if parts.local(values)[free[parts.held_rows(values)]].any():
                raise CheckpointError(f"{key}: a slot nobody owns is not 0")


def checked_events(saved: Saved, engine: AllocatorEngine) -> list[GrowthEvent]:
    """Rebuild the growth events; they must lead to the ranks of the engine."""
    arrays: dict[str, dict[str, NDArray[Any]]] = {field: {} for field in EVENT_FIELDS}
    for key, (name, field) in _event_keys(saved, engine).items():
        arrays[field][name] = saved.tensors[key].numpy().copy()  # else the file stays mapped
    for name, ranks in arrays["ranks"].items():
        # The engine may have had a history before this adapter: the first ranks are any.
        follows = (np.diff(ranks, axis=0) == arrays["deltas"][name][1:]).all()
        if not follows or (ranks[-1] != engine.ranks(name)).any():
            raise CheckpointError(f"layer {name!r}: the growth events lead to other ranks")
    scalars = [
        {field: count(event[field], f"{field} of an event") for field in EVENT_COUNTS}
        for event in saved.events
    ]
    steps = [event["step"] for event in scalars]
    if any(b <= a for a, b in itertools.pairwise([0, *steps])):
        raise CheckpointError(f"impossible steps of events: {steps}")
    return [
        GrowthEvent(
            step=event["step"],
            index=event["index"],
            unplaced=event["unplaced"],
            **{field: {name: a[k] for name, a in of.items()} for field, of in arrays.items()},
        )
        for k, event in enumerate(scalars)
    ]


def _event_keys(saved: Saved, engine: AllocatorEngine) -> dict[str, tuple[str, str]]:
    """Tensors of events in a file, with their layer and field; a run without events has none."""
    return {
        f"{name}/events/{field}": (name, field)
        for name in (engine.layer_names if saved.events else ())
        for field in EVENT_FIELDS
        if field != "cut" or engine.config.cuts
    }


def _lora_shapes(saved: Saved, name: str) -> dict[str, int]:
    """A and B of a layer, and how many features each has."""
    targets = saved.options.targets
    return {
        f"{name}/{projection}/{part}": features
        for projection, shape in saved.layers[name]["projections"].items()
        if targets is None or projection in targets
        for part, features in zip(("lora_A", "lora_B"), shape, strict=True)
    }


def _dense_shapes(saved: Saved, model: nn.Module) -> Wanted:
    """A and B of the Linears beside the experts."""
    wanted: Wanted = {}
    named, rank = dict(model.named_modules()), saved.options.attention_rank
    for name in saved.dense:
        linear: Any = named.get(name)
        if rank is None or not hasattr(linear, "out_features"):
            raise CheckpointError(
                f"the adapter has LoRA of a Linear {name!r} that the model does not have"
            )
        wanted[f"dense/{name}/lora_A"] = (rank, linear.in_features), None
        wanted[f"dense/{name}/lora_B"] = (linear.out_features, rank), None
    return wanted


def _wanted_tensors(
    saved: Saved, engine: AllocatorEngine, model: nn.Module, records: Mapping[str, MoELayer]
) -> Wanted:
    """The tensors that a file of these layers and options must hold, the engine's aside."""
    wanted: Wanted = {}
    for key, (name, field) in _event_keys(saved, engine).items():
        dimensions = (engine.config.r_max,) if field == "cut" else ()
        shape = (len(saved.events), engine.num_experts(name), *dimensions)
        wanted[key] = shape, EVENT_FIELDS[field]
    for name, layer in saved.layers.items():
        slots = layer["num_experts"] * saved.options.slots_per_expert(engine.config)
        wanted |= {f"{name}/{field}": ((slots,), torch.int64) for field in SLOT_FIELDS}
        for key, features in _lora_shapes(saved, name).items():
            wanted[key] = (slots, features), None
    wanted |= _dense_shapes(saved, model)
    routers: dict[str, nn.Parameter] = {}
    chosen = [records[name] for name in saved.layers]
    for router in (record.router for record in chosen):
        if saved.options.router is not RouterMode.FROZEN and router is not None:
            named = model.get_submodule(router).named_parameters()
            routers |= {f"{router}.{name}": parameter for name, parameter in named}
    modules = choose_modules(model, saved.options.modules_to_save, chosen)
    for name, parameter in join_base(routers, modules).items():
        wanted[base_key(name, routers)] = tuple(parameter.shape), None
    return wanted


def _partial_state(wanted: Wanted, saved: Saved) -> Wanted:
    """Tensors of the partial state of a step that a file may hold."""
    found: Wanted = {
        f"{ROUTING}{name}": ((layer["num_experts"] + 1,), None)
        for name, layer in saved.layers.items()
    }
    for key, (shape, dtype) in wanted.items():
        if dtype is None:  # it learns
            found[f"{GRADIENT}{key}"] = shape, None
            if not saved.options.auto_step and not key.startswith(("router/", "module/", "dense/")):
                found[f"{IMPORTANCE}{key}"] = shape[:1], None
    return found
