"""Export the adapter in the folder of a run as a PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from drlora_torch.api import load
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder
from drlora_torch.finetune.model import load_model
from drlora_torch.integrations.trainer import last_checkpoint

if TYPE_CHECKING:
    from drlora_torch.storage.peft.exporting import ExportReport

DEFAULT_FOLDER = "peft"


def export_run(
    run: Path, output: Path | None = None, *, rank: int | None = None, per_expert: bool = False
) -> ExportReport:
    """Export the adapter of a run, or its last checkpoint if the run is not finished.

    Args:
        run: the folder of ``drlora finetune``.
        output: folder to write to; default: ``peft`` in the folder of the run.
        rank: compress every expert to this rank.
        per_expert: write one LoRA per expert and projection.

    Raises:
        RunError: there is no run, it has saved no adapter yet, or ``output`` is not empty.
        DRLoRAError: the model or the adapter cannot be loaded.
    """
    options = folder.read(run).options
    source = run / folder.ADAPTER
    if not source.is_dir():
        checkpoint = last_checkpoint(run / folder.CHECKPOINTS)
        if checkpoint is None:
            raise RunError(f"the run in {str(run)!r} has saved no adapter yet")
        source = Path(checkpoint)
    target = output or run / DEFAULT_FOLDER
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{str(target)!r} exists; use another --output")
    adapter = load(load_model(options.model, options.dtype), source)
    return adapter.export_peft(target, rank=rank, per_expert=per_expert)
