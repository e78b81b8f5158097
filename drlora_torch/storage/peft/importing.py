"""Start from a PEFT adapter of the experts: its B A becomes the adapter's, at the starting ranks.

It reads every layout that :mod:`drlora_torch.storage.peft` writes, from any trainer: stacked
``target_parameters``, Linears, and one LoRA per expert and projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.lifecycle.trained import trained_values
from drlora_torch.storage.peft import dense, files, layouts
from drlora_torch.storage.peft.factors import Expert, Factors, FloatArray, resize, write_slots
from drlora_torch.storage.peft.files import PREFIX, own_name


@torch.no_grad()
def start_from(attached: Attached, path: Path) -> dict[str, dict[str, FloatArray]]:
    """Carry out :meth:`drlora_torch.Adapter.import_peft`: take every tensor, then change values."""
    if steps := attached.engine.step_count:
        raise AttachError(
            f"import_peft is a starting point, but the adapter made {steps} steps; attach a new one"
        )
    held, config = files.read(path)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise CheckpointError(f"{path} is not plain LoRA, which is all that can be imported")
    found = _take_experts(attached, config, held)
    linears = dense.take(attached, config, held)
    learning = trained_values(attached)
    whole = {}
    for name in files.module_values(attached):
        value = held.pop(PREFIX + own_name(name), None)
        if value is None or name not in learning:
            continue  # buffers are the base model's
        if value.shape != learning[name].shape:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}")
        whole[name] = value
    if held:
        raise CheckpointError(
            f"{path} also adapts {min(held)!r}; attach with the matching targets, layers, "
            "router, modules_to_save and attention_rank, or load other modules with PEFT"
        )
    if not found:
        raise CheckpointError(f"{path} holds no LoRA of the adapted experts")
    if all(attached.layers[name].lora.is_idle for name, _ in found):
        raise CheckpointError(
            f"every expert starts at rank 0, which holds nothing of {path}; use r_init >= 1"
        )
    scaling = attached.options.scaling(attached.engine.config)
    errors: dict[str, dict[str, FloatArray]] = {}
    for (name, projection), experts in found.items():
        lora = attached.layers[name].lora
        (lora_A, lora_B), error = resize(experts, lora.table.ranks())
        errors.setdefault(name, {})[projection] = error
        write_slots(lora, dict(lora.items())[projection], Factors(lora_A, lora_B / scaling))
    for name, value in whole.items():
        learning[name].copy_(value)
    return errors | dense.give(attached, linears)


def _take_experts(
    attached: Attached, config: Mapping[str, Any], held: dict[str, Tensor]
) -> dict[tuple[str, str], list[Expert]]:
    """Take the LoRA of the experts out of ``held``, by layer and projection, and check it."""
    found: dict[tuple[str, str], list[Expert]] = {}
    suffixes = tuple(f".{target}" for target in config.get("target_parameters") or ())
    for name, layer in attached.layers.items():
        for projection, target in layouts.stacked(layer, suffixes).items():
            experts = target.take(held, config, layer.record.num_experts)
            found[name, projection] = experts
    for (name, projection), namings in layouts.namings(attached).items():
        outputs = attached.layers[name].record.projections[projection].out_features
        for places in namings:
            if experts := layouts.take_places(held, config, places, outputs):
                found[name, projection] = experts
    for (name, projection), experts in found.items():
        where, shape = f"{name}.{projection}", attached.layers[name].record.projections[projection]
        for lora_A, lora_B in experts:
            features = (lora_A.shape[1], lora_B.shape[0])
            if features != shape:
                raise CheckpointError(f"{where} has features {tuple(shape)}, PEFT's {features}")
            if lora_A.shape[0] != lora_B.shape[1]:
                raise CheckpointError(f"{where}: A and B of the PEFT adapter differ in rank")
            if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
                raise CheckpointError(f"{where}: the PEFT adapter holds values that are not finite")
    return found
