"""Compare the written model with the adapted one before it takes the place of older files.

A merged model is off by rounding alone, in directions that have nothing to do with the update. So
the written logits are projected on what the adapter changes: 1 if the update is in them, 0 if it
was lost.
"""

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
LEAST_SHARE = 0.5
LARGEST_ERROR = 0.1
"""Of the logits, where the adapter itself changes less: more than rounding makes."""
VISIBLE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""Relative change of logits from which on a projection tells something."""
FULL = "it does not fit into memory beside this one"
Compared = tuple[float | None, float | None]


def compare_logits(attached: Attached, folder: Path, quantized: bool) -> Compared:
    """Error of the written model and effect of the adapter, relative to the adapted logits.

    Raises:
        CheckpointError: the written model is not the merged one.
    """
    model = attached.model
    if (obstacle := _obstacle(model, folder)) is not None:
        return _skip(obstacle)
    try:
        base, adapted, written = _run(attached, folder)
    except _NotRunError as reason:
        return _skip(str(reason))
    size = float(adapted.norm().clamp(min=1e-30))
    error, effect = (float((each - adapted).norm()) / size for each in (written, base))
    share = _share(base, adapted, written)
    visible = effect > VISIBLE.get(checkpoints.float_dtype(model), 1e-5)
    lost = visible and not share > LEAST_SHARE
    if not quantized and (lost or not error <= max(effect, LARGEST_ERROR)):
        raise CheckpointError(
            f"the written model does not compute what the adapted one does: its logits have "
            f"{share:.0%} of what the adapter changes, and differ by {error:.2%} (the base by "
            f"{effect:.2%}); nothing was replaced (compare=False writes it all the same)"
        )
    if quantized and visible and not share > LEAST_SHARE:
        logger.warning(
            "packing the merged experts again has left %.0f %% of what the adapter changes in the "
            "logits; without quantize=True nothing of it is lost",
            100 * share,
        )
    return error, effect


class _NotRunError(Exception):
    """A model cannot be run, for the reason it gives."""


def _run(attached: Attached, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of the base, of the adapted and of the written model."""
    model = attached.model
    # A model that wants more than token ids says so in its own way.
    adapted = _probe(model, "it does not run on token ids alone")
    with disabled(attached):  # torch's grouped product takes no float64, the adapter's does
        base = _probe(model, "the model does not run without the adapter")
    try:
        reloaded = checkpoints.reload(model, folder)
    except (MemoryError, torch.OutOfMemoryError) as full:
        raise _NotRunError(FULL) from full
    return base, adapted, _probe(reloaded, "it does not run on the CPU")


def _probe(model: torch.nn.Module, failure: str) -> Tensor:
    try:
        return checkpoints.probe(model)
    except (MemoryError, torch.OutOfMemoryError) as full:
        raise _NotRunError(FULL) from full
    except Exception as reason:
        raise _NotRunError(f"{failure} ({reason})") from reason


def _share(base: Tensor, adapted: Tensor, written: Tensor) -> float:
    """How much of the way from the base to the adapted logits the written ones have gone."""
    way = (adapted - base).flatten()
    return float((written - base).flatten() @ way / (way @ way).clamp(min=1e-30))


def _obstacle(model: torch.nn.Module, folder: Path) -> str | None:
    if is_adapted_by_peft(model):
        return "PEFT has an adapter in this one"
    if not checkpoints.can_reload(model):
        return "it is no model of Transformers that reads token ids"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > _free_memory():
        return f"{size / 1e9:.1f} GB do not fit into memory beside this one"
    return None


def _skip(reason: str) -> Compared:
    logger.warning("the merged model was not run to compare it: %s", reason)
    return None, None


def _free_memory() -> float:
    """Bytes that this process may still take; infinite where that is not known."""
    limits = [_of_machine()]
    group = Path("/sys/fs/cgroup")
    for most, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        try:
            limits.append(float(most.read_text()) - float(used.read_text()))
        except (OSError, ValueError):  # there is no such limit
            continue
    return min(limits)


def _of_machine() -> float:
    """Bytes that are free, or held by caches."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":") for line in lines)
        return float(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pages = getattr(os, "sysconf", lambda name: -1)("SC_AVPHYS_PAGES")
        return float("inf") if pages < 0 else float(pages * os.sysconf("SC_PAGE_SIZE"))
