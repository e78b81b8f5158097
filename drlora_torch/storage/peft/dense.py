"""The LoRA of Linears beside the experts in a PEFT directory: ``target_modules``.

PEFT 0.21 takes the names that experts had before Transformers fused them for those of experts,
wherever they are: it would not adapt a shared expert's ``gate_proj``. So beside fused experts, a
Linear of such a name is given by its weight (``target_parameters``), which has the same tensors.

Shape letters: R rank, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.models.spelling import spellings
from drlora_torch.storage.peft.config import PeftConfig
from drlora_torch.storage.peft.factors import Expert, FloatArray, check_fits, resize
from drlora_torch.storage.peft.files import (
    PREFIX,
    Linear,
    joined,
    number,
    own_name,
    pattern,
)

Tensors = dict[str, Tensor]
RENAMED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Last parts of the names that PEFT takes for those of fused experts."""


def common_rank(attached: Attached, wanted: int | None, largest: int) -> int:
    """The one rank of a directory for serving engines, where experts have at most ``largest``.

    Raises:
        CheckpointError: the wanted one is smaller than that of the Linears.
    """
    own = attached.options.attention_rank or 1
    if wanted is not None and wanted < own:
        raise CheckpointError(
            f"rank={wanted} with per_expert=True must be at least attention_rank={own}: the "
            "experts are compressed, other Linears are not, and serving engines take one rank; "
            f"use rank={own}"
        )
    return max(own, largest)


def export(attached: Attached, config: dict[str, Any], separate: bool) -> Tensors:
    """The tensors of the Linears, which are added to PEFT's configuration.

    With ``separate`` they get the one rank and scaling that serving engines take.
    """
    tensors: Tensors = {}
    scaling = config["lora_alpha"] / config["r"]
    spelled = spellings(attached.model, map(own_name, attached.dense))
    if lost := [name for name, spelling in spelled.items() if spelling is None]:
        raise CheckpointError(
            f"PEFT would not find the LoRA of {len(lost)} Linears ({lost[0]}), since Transformers "
            "renames their keys; use merge_and_save(), or attach without attention_rank"
        )
    for name, each in attached.dense.items():
        lora_A, lora_B = (matrix.detach().cpu() for matrix in each.lora.parameters())
        if separate:
            missing = config["r"] - each.lora.rank
            lora_A = nn.functional.pad(lora_A, (0, 0, 0, missing))
            lora_B = nn.functional.pad(lora_B * (each.lora.scaling / scaling), (0, missing))
        tensors[f"{PREFIX}{spelled[own_name(name)]}.lora_A.weight"] = lora_A.clone()
        tensors[f"{PREFIX}{spelled[own_name(name)]}.lora_B.weight"] = lora_B.clone()
    if tensors:
        _add_to(config, attached, separate)
    return tensors


def _add_to(config: dict[str, Any], attached: Attached, separate: bool) -> None:
    """Have PEFT adapt the Linears too, with a rank and a scaling of their own."""
    split = [own_name(name).rpartition(".") for name in attached.dense]
    if separate:
        config["target_modules"] = sorted({*config["target_modules"], *(s[2] for s in split)})
        return
    linears: list[Linear] = [(parent, "", leaf) for parent, _, leaf in split]
    key = rf"(?:{pattern(linears)})(?:\.weight)?"
    lora = next(iter(attached.dense.values())).lora
    config["rank_pattern"][key] = lora.rank
    config["alpha_pattern"][key] = number(lora.scaling * lora.rank)
    if isinstance(config["target_modules"], str):  # a pattern: the experts are Linears too
        config["target_modules"] += f"|{pattern(linears)}"
        return
    fused = config["target_parameters"] is not None
    by_weight = [joined(*s[::2]) for s in split if fused and s[2] in RENAMED]
    named = [joined(*s[::2]) for s in split]
    config["target_modules"] = [name for name in named if name not in by_weight]
    if by_weight:
        config["target_parameters"] += [f"{name}.weight" for name in by_weight]


def take(attached: Attached, config: PeftConfig, held: Tensors) -> dict[str, tuple[Expert, float]]:
    """Take the LoRA of the Linears out of ``held``, at their rank and scaling, with its error."""
    found = {}
    spelled = spellings(attached.model, map(own_name, attached.dense))
    for name, each in attached.dense.items():
        for key in (spelled[own_name(name)], own_name(name)):
            keys = [f"{PREFIX}{key}.lora_{part}.weight" for part in "AB"]
            if held.keys() & keys:
                break
        if not held.keys() & keys:
            continue
        try:
            lora_A, lora_B = (held.pop(key).float() for key in keys)
            shapes = (lora_A.shape[1], lora_B.shape[0], lora_A.shape[0])
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"incomplete or ill-shaped LoRA of {name!r}: {error}") from error
        wanted = (each.lora.lora_A.shape[1], each.lora.lora_B.shape[0], lora_B.shape[-1])
        if shapes != wanted:
            raise CheckpointError(
                f"the LoRA of {name!r} has A {list(lora_A.shape)} and B {list(lora_B.shape)}; "
                f"wanted are A [R, {wanted[0]}] and B [{wanted[1]}, R]"
            )
        given = config.target_parameters or ()
        weight = f"{own_name(name)}.weight"
        by_weight = any(f".{weight}".endswith(f".{target}") for target in given)
        target = weight if by_weight else own_name(name)
        lora_B = config.scaling(target) / each.lora.scaling * lora_B
        check_fits(name, (lora_A, lora_B), each.lora.lora_A.dtype)
        (first_A, first_B), error_of = resize([(lora_A, lora_B)], each.lora.rank)
        check_fits(name, (first_A, first_B), each.lora.lora_A.dtype)
        found[name] = (first_A[0], first_B[0]), float(error_of[0])
    return found


@torch.no_grad()
def give(
    attached: Attached, found: Mapping[str, tuple[Expert, float]]
) -> dict[str, dict[str, FloatArray]]:
    """Give the Linears what was taken; dimensions in which B is 0 keep their fresh rows of A.

    Returns:
        Relative errors, as for the experts: by Linear, ``weight``, [1].
    """
    errors = {}
    for name, ((lora_A, lora_B), error) in found.items():
        lora = attached.dense[name].lora
        filled = (lora_B != 0).any(dim=0).to(lora.lora_A.device)
        lora.lora_A.copy_(torch.where(filled[:, None], lora_A.to(lora.lora_A), lora.lora_A))
        lora.lora_B.copy_(lora_B)
        errors[name] = {"weight": np.array([error])}
    return errors
