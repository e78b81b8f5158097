"""Run a fine-tuning job, from its options to the files in its folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

from drlora_core import AllocatorEngine
from drlora_core.recording import RecordingWriter
from drlora_torch.adapter import Adapter
from drlora_torch.api import attach
from drlora_torch.finetune import data, folder, result
from drlora_torch.finetune.meter import Meter
from drlora_torch.finetune.model import load_model, load_tokenizer
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.progress import RichProgress, quiet_libraries
from drlora_torch.finetune.result import RunResult
from drlora_torch.integrations.trainer import last_checkpoint

ATTACH_OPTIONS = {"alpha", "dropout", "layout", "router"}
"""Options that :func:`drlora_torch.attach` takes under the same name."""
FILES = (folder.ADAPTER, folder.METRICS, folder.RECORDING)


def run(
    options: FinetuneOptions,
    output: Path,
    console: Console,
    *,
    compare: Literal["uniform"] | None = None,
    resume: bool = False,
) -> list[RunResult]:
    """Fine-tune, evaluate, save and print the results.

    Args:
        options: the options of the run.
        output: folder of the run; it must not exist unless ``resume``.
        console: where progress and tables are printed.
        compare: ``uniform`` trains static LoRA with the same budget too.
        resume: continue from the last checkpoint in ``output``.

    Returns:
        The result of each method, DR-LoRA first.

    Raises:
        DRLoRAError: the model, the data or the folder does not fit; nothing was overwritten.
        pydantic.ValidationError: impossible ranks or an impossible growth window.
    """
    config = options.allocator_config()  # refuses an impossible window before anything is loaded
    with quiet_libraries():
        with console.status("loading model and data"):
            model, tokenizer = (
                load_model(options.model, options.dtype),
                load_tokenizer(options.model),
            )
            rows = data.load_rows(options)
        data.check_template(rows[0], tokenizer, options.model)
        with _attached(model, options) as adapter:
            if not resume:
                folder.create(output, folder.SavedRun(options=options, compare=compare))
            console.print(
                f"{options.model}: {len(rows[0])} training rows, {len(rows[1])} held out; "
                f"{options.steps} steps, mean rank {config.starting_rank} to {config.r_target} "
                f"(largest {config.r_max}) in {config.num_events} events"
            )
            results = [_train(options, adapter, tokenizer, rows, output, console)]
        if compare is not None:
            static = options.uniform()
            with _attached(model, static) as adapter:
                results.append(_train(static, adapter, tokenizer, rows, output / compare, console))
    folder.write_json(output / folder.RESULT, [each.model_dump() for each in results])
    result.show(console, results, output)
    return results


@contextlib.contextmanager
def _attached(model: nn.Module, options: FinetuneOptions) -> Iterator[Adapter]:
    """Attach an adapter; on leaving, the model is as before."""
    engine = AllocatorEngine(options.allocator_config())
    adapter = attach(model, engine, **options.model_dump(include=ATTACH_OPTIONS))
    try:
        yield adapter
    finally:
        adapter.detach()


def _train(
    options: FinetuneOptions,
    adapter: Adapter,
    tokenizer: Any,
    rows: tuple[Any, Any],
    output: Path,
    console: Console,
) -> RunResult:
    """Train one method, or continue it from its last checkpoint, and write its files."""
    from drlora_torch.finetune.training import build_trainer, train

    checkpoints = output / folder.CHECKPOINTS
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint is None:  # a run that stopped before its first one starts again
        shutil.rmtree(output / folder.RECORDING, ignore_errors=True)
    recorder = RecordingWriter(output / folder.RECORDING, adapter.engine, policy=options.policy)
    adapter.engine.record_to(recorder)
    meter, progress = Meter(), RichProgress(result.method_name(options.policy), console)
    try:
        trainer = build_trainer(
            options, adapter, tokenizer, rows, checkpoints, recorder, [meter, progress]
        )
        before = _held_out_loss(trainer, console)
        train(trainer, adapter, checkpoint)
        after = _held_out_loss(trainer, console)
    finally:
        progress.close()
        adapter.engine.record_to(None)
    adapter.save_pretrained(output / folder.ADAPTER)
    folder.write_metrics(output / folder.METRICS, trainer.state.log_history)
    ranks = {name: layer.tolist() for name, layer in adapter.ranks().items()}
    return RunResult(
        method=options.policy,
        loss_before=before,
        loss_after=after,
        tokens_per_second=meter.tokens / meter.seconds if meter.tokens else None,
        seconds=meter.seconds,
        peak_memory_mb=meter.peak_memory_mb,
        memory_source=meter.memory_source,
        budget=sum(adapter.engine.budget(name) for name in ranks),
        total_rank=sum(map(sum, ranks.values())),
        skipped_steps=adapter.skipped_steps,
        ranks=ranks,
        files=[str(output / name) for name in FILES],
    )


def _held_out_loss(trainer: Any, console: Console) -> float:
    with console.status("held-out loss"):
        return float(trainer.evaluate()["eval_loss"])
