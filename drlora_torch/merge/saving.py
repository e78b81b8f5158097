"""``merge_and_save``: the merged model as a checkpoint, while the model stays as it is.

Weights that can be written to hold W + s B A while Transformers saves the model. Packed ones are
unpacked, added to and written a layer at a time.

Shape letters: I input and O output features.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from drlora_core import atomic
from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, CheckpointError, ModelError
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.merge import packed
from drlora_torch.merge.comparison import Compared, compare_logits
from drlora_torch.merge.in_place import is_packed, written
from drlora_torch.merge.report import MergeReport
from drlora_torch.merge.rounding import Rounding
from drlora_torch.models.quantization.checkpoints import float_dtype, original_names
from drlora_torch.storage import checkpoint
from drlora_torch.storage.saving import without_flag
from drlora_torch.storage.travel import settle


def merge_and_save(
    attached: Attached, path: Path, *, quantize: bool = False, compare: bool = True
) -> MergeReport:
    """Write the merged model as a plain Transformers checkpoint; the adapter stays as it is."""
    active_tracker(attached)
    settle(attached)
    if not attached.enabled:
        raise AttachError("merge_and_save() cannot run inside adapter.disabled()")
    save_model: Any = getattr(attached.model, "save_pretrained", None)
    save_model = getattr(save_model, "drlora_inner", save_model)  # without adapters beside it
    if save_model is None:
        raise ModelError(
            f"{type(attached.model).__name__} has no save_pretrained; call adapter.merge() and "
            "save model.state_dict() yourself"
        )
    experts_packed = any(map(is_packed, attached.layers.values()))
    of_packed = experts_packed or any(map(is_packed, attached.dense.values()))
    if quantize and not experts_packed:
        raise ModelError(
            "quantize=True packs the merged experts again, and those of this model are not packed; "
            "load the merged checkpoint with drlora_torch.Experts4bitConfig() instead"
        )
    checkpoint.check_finite(attached)
    rounding = Rounding()
    try:
        with atomic.replaced_files(path, "model*.safetensors*") as folder:
            if of_packed:
                packed.write(attached, folder, rounding, quantize=quantize)
            else:
                with (
                    original_names(attached.model),
                    without_flag(attached.model),
                    written(attached, rounding),
                ):
                    save_model(os.fspath(folder))
            logits: Compared = (None, None)
            if compare:
                logits = compare_logits(attached, folder, quantize)
    except (OSError, SafetensorError) as failure:
        raise CheckpointError(
            f"could not write a merged model to {path}: {failure}; what was there before is "
            "untouched"
        ) from failure
    return MergeReport(path, _storage(attached, quantize), rounding.relative, *logits)


def _storage(attached: Attached, quantized: bool) -> str:
    first = next(iter(attached.layers.values()))
    if quantized or not is_packed(first):
        return first.record.dtype
    return str(float_dtype(attached.model)).removeprefix("torch.")
