"""Compare the written model with the adapted one before it takes the place of older files."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.switches import disabled
from drlora_torch.models.quantization import checkpoints
from drlora_torch.models.wrappers import is_adapted_by_peft

logger = logging.getLogger(__name__)
SHARE = 0.5
"""Of the adapter's effect; a merged model that is further off has lost the update."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error of logits that rounding alone makes, with a margin."""
Compared = tuple[float | None, float | None]


def compare_logits(attached: Attached, folder: Path, quantized: bool) -> Compared:
    """Error of the written model and effect of the adapter, relative to the adapted logits.

    Raises:
        CheckpointError: the written model is not the merged one.
    """
    model = attached.model
    if not checkpoints.can_reload(model) or is_adapted_by_peft(model):
        return None, None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > _free_memory():
        logger.warning(
            "the merged model (%.1f GB) was not run to compare it, since it does not fit into "
            "memory beside this one",
            size / 1e9,
        )
        return None, None
    try:
        adapted = checkpoints.probe(model)
    except Exception as reason:  # a model that wants more than token ids says so in its own way
        logger.info("the merged model was not run to compare it: %s", reason)
        return None, None
    with disabled(attached):
        effect = _distance(checkpoints.probe(model), adapted)
    error = _distance(checkpoints.probe(checkpoints.reload(model, folder)), adapted)
    known = ROUNDING.get(checkpoints.float_dtype(model), 1e-3)
    if not quantized and not error <= max(SHARE * effect, known):
        raise CheckpointError(
            f"the written model does not compute what the adapted one does: its logits differ by "
            f"{error:.2%}, and those of the base by {effect:.2%}; nothing was replaced "
            "(compare=False writes it all the same)"
        )
    return error, effect


def _distance(have: Tensor, want: Tensor) -> float:
    return float((have - want).norm() / want.norm().clamp(min=1e-30))


def _free_memory() -> float:
    """Bytes of memory that are free, or held by caches; infinite where that is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":") for line in lines)
        return float(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pages = getattr(os, "sysconf", lambda name: -1)("SC_AVPHYS_PAGES")
        return float("inf") if pages < 0 else float(pages * os.sysconf("SC_PAGE_SIZE"))
