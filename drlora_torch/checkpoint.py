"""Save an adapter and load it again: weights, slot tables, engine state and options.

Tensors of a file, by layer: ``{layer}/{projection}/lora_A`` [P, I] and ``lora_B`` [P, O] (row s of
both belongs to slot s), ``{layer}/owner``, ``{layer}/position`` and ``{layer}/ages`` int64 [P];
the engine's arrays as ``{layer}/engine/{field}``; learning routers as ``router/{parameter}``; what
an unfinished step has gathered as ``pending/...``, see :mod:`drlora_torch.pending`.

Format versions: 1 had no pending tensors and is otherwise the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError, Policy
from drlora_torch import files, fingerprint, pending
from drlora_torch.adapter import Adapter
from drlora_torch.attaching import attach
from drlora_torch.errors import CheckpointError
from drlora_torch.hub import find
from drlora_torch.integrations.beside_peft import unwrapped
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.discovery import discover
from drlora_torch.named import NamedAdapters, check_name
from drlora_torch.options import AdapterOptions, RouterMode
from drlora_torch.pending import Wanted
from drlora_torch.slots import FREE, Layout

VERSION = 2
READ = (1, 2)


def save(adapter: Adapter, path: str | os.PathLike[str]) -> Path:
    """Write the adapter file; see :meth:`drlora_torch.Adapter.save_pretrained`."""
    state = adapter.engine.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors |= _layer_tensors(layer.lora, adapter.newborn.ages[name])
        fields = state["layers"][name]
        for field, value in list(fields.items()):
            if isinstance(value, np.ndarray):
                tensors[f"{name}/engine/{field}"] = torch.from_numpy(fields.pop(field))
    for name, values in adapter.trained_routers().items():
        tensors[f"router/{name}"] = values
    tensors |= pending.of(adapter)
    description = {
        "version": VERSION,
        "options": adapter.options.model_dump(mode="json"),
        "engine": state,
        "skipped_steps": adapter.skipped_steps,
        "base": fingerprint.of_model(
            adapter.model, [layer.record for layer in adapter.layers.values()]
        ),
        "layers": {
            name: {
                "num_experts": layer.record.num_experts,
                "projections": {p: list(s) for p, s in layer.record.projections.items()},
            }
            for name, layer in adapter.layers.items()
        },
    }
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return files.write(Path(path), whole, description)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    policy: Policy | None = None,
    trainable: bool = True,
    check_base: bool = True,
    revision: str | None = None,
) -> Adapter:
    """Attach a saved adapter to its base model, ready to be used or trained further.

    Args:
        model: the base model, without an adapter of this name.
        path: the directory (or file) that ``adapter.save_pretrained`` wrote, or the id of a
            repository on the Hugging Face hub that holds it.
        adapter_name: as for :func:`drlora_torch.attach`; the loaded adapter is the active one.
        policy: the callable that the run was made with, if it was: code is not saved, so without
            it the allocation goes on with ``config.policy``.
        trainable: False to use it only: nothing is counted and nothing requires a gradient.
        check_base: False to load onto a model whose expert weights are not those of the training.
        revision: branch, tag or commit, for a repository.

    Raises:
        CheckpointError: the file is missing, damaged, foreign or of another model. The model is
            left unchanged.
        AttachError: the model has an adapter of this name already.
    """
    model = unwrapped(model)
    check_name(adapter_name, NamedAdapters.of(model).by_name)
    saved = _read(find(path, revision), model, check_base)
    engine = AllocatorEngine(saved.config, policy=policy)
    engine.load_state_dict(saved.state)
    arguments = {**saved.options.model_dump(mode="json"), "layers": list(saved.layers)}
    adapter = attach(model, engine, adapter_name=adapter_name, **arguments)
    _fill(adapter, saved)
    if trainable:
        pending.fill(adapter, saved.tensors)
    else:
        adapter.use_only()
    return adapter


def restore(adapter: Adapter, path: str | os.PathLike[str], *, check_base: bool = True) -> None:
    """Bring an attached adapter to a saved state, in place: parameters keep their identity.

    This is how a trainer resumes whose optimizer already holds ``adapter.parameters()``.

    Raises:
        CheckpointError: as :func:`load`, or the adapter was made with other options.
    """
    saved = _read(Path(path), adapter.model, check_base)
    own = adapter.options.model_dump(exclude={"layers"})
    if saved.options.model_dump(exclude={"layers"}) != own or set(saved.layers) != set(
        adapter.layers
    ):
        raise CheckpointError(f"{path} was saved by an adapter with other options or layers")
    try:
        adapter.engine.load_state_dict(saved.state)
    except LayoutError as error:
        raise CheckpointError(f"{path} does not fit the adapter's engine: {error}") from error
    _fill(adapter, saved)
    pending.fill(adapter, saved.tensors)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    """A file that has passed every check against a model."""

    layers: Mapping[str, Any]
    options: AdapterOptions
    config: AllocatorConfig
    state: Mapping[str, Any]  # of the engine
    tensors: Mapping[str, Tensor]
    skipped_steps: int


def _read(path: Path, model: nn.Module, check_base: bool) -> _Saved:
    tensors, description = files.read(path)
    try:
        layers, options, state = _parts(description, tensors)
        config = AllocatorConfig.model_validate(state["config"])
        _check_model(model, layers, description.get("base") if check_base else None)
        wanted = _wanted(model, layers, options, config)
        _check_tensors(tensors, wanted, pending.allowed(wanted, layers, options.auto_step))
        pending.check_counts(tensors)
        trial = AllocatorEngine(config)
        trial.load_state_dict(state)
        _check_slots(tensors, layers, options, trial)
        return _Saved(layers, options, config, state, tensors, int(description["skipped_steps"]))
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is not a complete adapter: {error!r}") from error
    except ValueError as error:  # DRLoRAError and ValidationError among them
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error


def _layer_tensors(lora: ExpertLoRA, ages: np.ndarray) -> dict[str, Tensor]:
    tensors = {
        f"{lora.name}/owner": torch.from_numpy(lora.table.owner),
        f"{lora.name}/position": torch.from_numpy(lora.table.position),
        f"{lora.name}/ages": torch.from_numpy(ages),
    }
    return {**tensors, **lora.tensors()}


def _parts(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], AdapterOptions, dict[str, Any]]:
    """Take the description apart; the engine's arrays come back from the tensors."""
    version = description["version"]
    if type(version) is not int or version not in READ:
        raise CheckpointError(
            f"the adapter has format version {version!r}; this drlora reads {READ[0]} and {READ[1]}"
            " (what a newer drlora has written needs a newer drlora)"
        )
    state = dict(description["engine"])
    state["layers"] = {name: dict(fields) for name, fields in state["layers"].items()}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/engine/")
        if name:
            state["layers"][name][field] = tensor.numpy()
    return dict(description["layers"]), AdapterOptions(**description["options"]), state


def _check_model(model: nn.Module, layers: Mapping[str, Any], base: object) -> None:
    found = {record.name: record for record in discover(model)}
    for name, saved in layers.items():
        if name not in found:
            raise CheckpointError(
                f"the adapter is for a layer {name!r}, which the model does not have "
                f"(it has {len(found)} MoE layers)"
            )
        record = found[name]
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
    fingerprint.check(model, found, base, "load(..., check_base=False) loads it all the same")


def _wanted(
    model: nn.Module, layers: Mapping[str, Any], options: AdapterOptions, config: AllocatorConfig
) -> Wanted:
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {}
    routers = {record.name: record.router for record in discover(model)}
    per_expert = config.r_max if options.layout is Layout.MASKED else config.mean_rank_ceiling
    for name, layer in layers.items():
        slots = layer["num_experts"] * per_expert
        wanted |= {f"{name}/{field}": ((slots,), False) for field in ("owner", "position", "ages")}
        for projection, (inputs, outputs) in layer["projections"].items():
            if options.targets is None or projection in options.targets:
                wanted[f"{name}/{projection}/lora_A"] = (slots, inputs), True
                wanted[f"{name}/{projection}/lora_B"] = (slots, outputs), True
        router = routers[name]
        if options.router is not RouterMode.FROZEN and router is not None:
            for parameter, value in model.get_submodule(router).named_parameters():
                wanted[f"router/{router}.{parameter}"] = tuple(value.shape), True
    return wanted


def _check_tensors(tensors: Mapping[str, Tensor], wanted: Wanted, optional: Wanted) -> None:
    """Every tensor that must be there, with its shape and kind; no other; nothing non-finite.

    What is pending may be there too and hold any value: after an overflow the step must be skipped.
    """
    own = {key: tensor for key, tensor in tensors.items() if "/engine/" not in key}
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


def _check_slots(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    options: AdapterOptions,
    engine: AllocatorEngine,
) -> None:
    """The slot tables must hold exactly the ranks of the engine, each dimension once."""
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


@torch.no_grad()
def _fill(adapter: Adapter, saved: _Saved) -> None:
    tensors = saved.tensors
    adapter.skipped_steps = saved.skipped_steps
    for name, layer in adapter.layers.items():
        table = layer.lora.table
        table.owner = tensors[f"{name}/owner"].numpy().copy()
        table.position = tensors[f"{name}/position"].numpy().copy()
        adapter.newborn.ages[name] = tensors[f"{name}/ages"].numpy().copy()
        for key, parameter in layer.lora.tensors().items():
            parameter.copy_(tensors[key])
        layer.lora.refresh()
    for name, values in adapter.trained_routers().items():
        values.copy_(tensors[f"router/{name}"])
    adapter.free_routers()
