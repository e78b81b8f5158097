"""``drlora export``: from the folder of a run to a PEFT directory."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from drlora_torch.api import load
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder
from drlora_torch.finetune.model import load_model
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.storage.peft.exporting import ExportReport

DEFAULT_FOLDER = "peft"


def export_run(
    run: Path, output: Path | None = None, *, rank: int | None = None, per_expert: bool = False
) -> ExportReport:
    """Export the adapter of a run, or its last checkpoint where the run is not finished.

    Args:
        run: the folder of ``drlora finetune``.
        output: where to; default: ``peft`` in the folder of the run.
        rank: compress every expert to this rank.
        per_expert: one LoRA per expert and projection.

    Raises:
        RunError: there is no run, it has saved nothing yet, or ``output`` is not empty.
        DRLoRAError: the model or the adapter cannot be loaded.
    """
    options = _options(run)
    source = run / folder.ADAPTER
    if not source.is_dir():
        checkpoint = folder.last_checkpoint(run)
        if checkpoint is None:
            raise RunError(f"the run in {str(run)!r} has saved no adapter yet")
        source = checkpoint
    target = output or run / DEFAULT_FOLDER
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{str(target)!r} exists; give another --output")
    model: nn.Module = load_model(options.model, options.dtype)
    return load(model, source).export_peft(target, rank=rank, per_expert=per_expert)


def _options(run: Path) -> FinetuneOptions:
    if not (run / folder.OPTIONS).is_file():
        raise RunError(f"{str(run)!r} is not the folder of a run: it has no {folder.OPTIONS}")
    try:
        saved = json.loads((run / folder.OPTIONS).read_text())
        return FinetuneOptions.model_validate(saved["options"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunError(f"{str(run / folder.OPTIONS)!r} cannot be read: {error}") from error
