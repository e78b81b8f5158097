"""What must hold of an adapter file before anything is loaded from it.

Shape letters: P rank slots, N experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.errors import CheckpointError
from drlora_torch.lora.slots import FREE, Layout
from drlora_torch.models.records import MoELayer
from drlora_torch.options import AdapterOptions, RouterMode
from drlora_torch.step.tracker import GRADIENT, IMPORTANCE, ROUTING
from drlora_torch.storage.history import MARK

Wanted = Mapping[str, tuple[tuple[int, ...], bool]]
"""Shapes of tensors in a file by name, and whether they hold floating-point numbers."""


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turn what damaged values raise into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is not a complete adapter: {error!r}") from error
    except ValueError as error:  # DRLoRAError and ValidationError among them
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def check_layers(layers: Mapping[str, Any], records: Mapping[str, MoELayer]) -> None:
    """The model has the layers of the file, with its experts and projections."""
    for name, saved in layers.items():
        if name not in records:
            raise CheckpointError(
                f"the adapter is for a layer {name!r}, which the model does not have "
                f"(it has {len(records)} MoE layers)"
            )
        record = records[name]
        if record.num_experts != saved["num_experts"]:
            raise CheckpointError(
                f"layer {name!r} has {record.num_experts} experts, the adapter is for "
                f"{saved['num_experts']}"
            )
        own = {projection: list(shape) for projection, shape in record.projections.items()}
        if own != saved["projections"]:
            raise CheckpointError(
                f"layer {name!r} has projections {own}, the adapter is for {saved['projections']}"
            )


def wanted_tensors(
    model: nn.Module,
    records: Mapping[str, MoELayer],
    layers: Mapping[str, Any],
    options: AdapterOptions,
    config: AllocatorConfig,
) -> Wanted:
    """The tensors that a file of these layers and options must hold."""
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, layer in layers.items():
        slots = layer["num_experts"] * options.slots_per_expert(config)
        wanted |= {f"{name}/{field}": ((slots,), False) for field in ("owner", "position", "ages")}
        for projection, (inputs, outputs) in layer["projections"].items():
            if options.targets is None or projection in options.targets:
                wanted[f"{name}/{projection}/lora_A"] = (slots, inputs), True
                wanted[f"{name}/{projection}/lora_B"] = (slots, outputs), True
        router = records[name].router
        if options.router is not RouterMode.FROZEN and router is not None:
            for parameter, value in model.get_submodule(router).named_parameters():
                wanted[f"router/{router}.{parameter}"] = tuple(value.shape), True
    return wanted


def check_tensors(
    tensors: Mapping[str, Tensor],
    wanted: Wanted,
    layers: Mapping[str, Any],
    options: AdapterOptions,
) -> None:
    """Every wanted tensor is there, with its shape and kind; no unknown one; all are finite.

    The partial state of a step may be there too, and may hold any value: after an overflow its
    step must be skipped.
    """
    own = {k: tensor for k, tensor in tensors.items() if "/engine/" not in k and MARK not in k}
    optional = _partial_state(wanted, layers, options.auto_step)
    present = {key: optional[key] for key in own.keys() & optional.keys()}
    differing = sorted((wanted.keys() | present.keys()) ^ own.keys())
    if differing:
        verb = "lacks" if differing[0] in wanted else "has an unknown"
        raise CheckpointError(f"the adapter {verb} tensor {differing[0]!r}")
    for key, (shape, floating) in {**wanted, **present}.items():
        if tuple(own[key].shape) != shape:
            raise CheckpointError(f"{key} has shape {tuple(own[key].shape)}, not {shape}")
        if not (own[key].is_floating_point() if floating else own[key].dtype == torch.int64):
            raise CheckpointError(f"{key} has a wrong dtype, {own[key].dtype}")
        if floating and key in wanted and not bool(torch.isfinite(own[key]).all()):
            raise CheckpointError(f"{key} holds values that are not finite")
        if key.startswith(ROUTING) and (bool((own[key] < 0).any()) or float(own[key][-1]) % 1):
            raise CheckpointError(f"{key} holds counts that are impossible")


def check_slots(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    options: AdapterOptions,
    engine: AllocatorEngine,
) -> None:
    """The slot tables hold exactly the ranks of the engine, each dimension once."""
    if set(engine.layer_names) != set(layers):
        raise CheckpointError("the saved engine is of other layers than the adapter")
    for name in engine.layer_names:
        owner, position = tensors[f"{name}/owner"].numpy(), tensors[f"{name}/position"].numpy()
        ranks = engine.ranks(name)
        held = owner != FREE
        owned = set(zip(owner[held].tolist(), position[held].tolist(), strict=True))
        wanted = {(e, j) for e, rank in enumerate(ranks.tolist()) for j in range(rank)}
        if owned != wanted or int(held.sum()) != len(wanted):
            raise CheckpointError(f"layer {name!r}: the slot table does not hold the saved ranks")
        reserved = np.flatnonzero(held) // engine.config.r_max
        if options.layout is Layout.MASKED and (owner[held] != reserved).any():
            raise CheckpointError(f"layer {name!r}: a slot belongs to another expert's range")
        ages = tensors[f"{name}/ages"].numpy()
        if ages.min() < -1 or (ages[~held] != -1).any():
            raise CheckpointError(f"layer {name!r}: ages of slots are impossible")
        free = torch.from_numpy(~held)
        for projection in layers[name]["projections"]:
            for part in ("lora_A", "lora_B"):
                tensor = tensors.get(f"{name}/{projection}/{part}")
                if tensor is not None and tensor[free].any():
                    raise CheckpointError(f"{name}/{projection}: a slot nobody owns is not 0")


def _partial_state(wanted: Wanted, layers: Mapping[str, Any], auto_step: bool) -> Wanted:
    """Tensors of the partial state of a step that a file may hold."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {
        f"{ROUTING}{name}": ((layers[name]["num_experts"] + 1,), True) for name in layers
    }
    for key, (shape, floating) in wanted.items():
        if floating:
            found[f"{GRADIENT}{key}"] = shape, True
            if not auto_step and not key.startswith("router/"):
                found[f"{IMPORTANCE}{key}"] = shape[:1], True
    return found
