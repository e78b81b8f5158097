"""Start from a PEFT adapter of the experts: its B A becomes the adapter's, at the starting ranks.

It reads every layout that :mod:`drlora_torch.storage.peft` writes, from any trainer: stacked
``target_parameters``, Linears, and one LoRA per expert and projection.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.lifecycle.trained import trained_values
from drlora_torch.storage.peft import dense, files, layouts
from drlora_torch.storage.peft.config import PeftConfig
from drlora_torch.storage.peft.factors import (
    Expert,
    Factors,
    FloatArray,
    check_fits,
    resize,
    write_slots,
)
from drlora_torch.storage.peft.files import PREFIX, own_name


@torch.no_grad()
def start_from(attached: Attached, path: Path) -> dict[str, dict[str, FloatArray]]:
    """Carry out :meth:`drlora_torch.Adapter.import_peft`: take every tensor, then change values."""
    if steps := attached.engine.step_count:
        raise AttachError(
            f"import_peft is a starting point, but the adapter made {steps} steps; attach a new one"
        )
    held, config = files.read(path)
    if config.peft_type != "LORA" or config.use_dora:
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
        check_fits(name, [value], learning[name].dtype)
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
    resized, errors = _resize(attached, found)
    for (name, projection), factors in resized.items():
        lora = attached.layers[name].lora
        write_slots(lora, dict(lora.items())[projection], factors)
    for name, value in whole.items():
        learning[name].copy_(value)
    return errors | dense.give(attached, linears)


Found = dict[tuple[str, str], list[Expert]]
"""The LoRA of each expert, by layer and projection."""


def _resize(
    attached: Attached, found: Found
) -> tuple[dict[tuple[str, str], Factors], dict[str, dict[str, FloatArray]]]:
    """What the experts hold of the LoRA at their own ranks and scaling, and its errors."""
    scaling = attached.options.scaling(attached.engine.config)
    resized: dict[tuple[str, str], Factors] = {}
    errors: dict[str, dict[str, FloatArray]] = {}
    for (name, projection), experts in found.items():
        lora = attached.layers[name].lora
        (lora_A, lora_B), error = resize(experts, lora.table.ranks())
        errors.setdefault(name, {})[projection] = error
        resized[name, projection] = factors = Factors(lora_A, lora_B / scaling)
        check_fits(f"{name}.{projection}", factors, dict(lora.items())[projection].lora_A.dtype)
    return resized, errors


def _take_experts(attached: Attached, config: PeftConfig, held: dict[str, Tensor]) -> Found:
    """Take the LoRA of the experts out of ``held``, by layer and projection, and check it."""
    found: Found = {}
    suffixes = tuple(f".{target}" for target in config.target_parameters or ())
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
            check_fits(where, (lora_A, lora_B), torch.float32)
    return found
