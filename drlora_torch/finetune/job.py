"""Run a fine-tuning job, from its options to the files in its folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

from drlora_core import AllocatorEngine, atomic
from drlora_torch.adapter import Adapter
from drlora_torch.api import attach
from drlora_torch.errors import DataError
from drlora_torch.finetune import folder, result
from drlora_torch.finetune.data import load_rows
from drlora_torch.finetune.meter import Meter
from drlora_torch.finetune.model import load_base, load_tokenizer
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.processes import agree_on, join_processes
from drlora_torch.finetune.progress import RichProgress, quiet_libraries
from drlora_torch.finetune.result import RunResult
from drlora_torch.finetune.sharding import Sharding
from drlora_torch.finetune.training import build_trainer, evaluate_first, train
from drlora_torch.integrations.trainer import last_checkpoint

ATTACH_OPTIONS = {"alpha", "dropout", "layout", "router"}
"""Options that :func:`drlora_torch.attach` takes under the same name."""


def run(
    options: FinetuneOptions,
    output: Path,
    console: Console,
    *,
    compare: Literal["uniform"] | None = None,
    resume: bool = False,
    sharding: Sharding | None = None,
) -> list[RunResult]:
    """Fine-tune, evaluate, save and print the results.

    Where torchrun or Accelerate has started several processes, each trains on its share of every
    batch, and the first one writes and prints. A run may go on in another number of processes, and
    with another sharding: a step has as many rows as before.

    Args:
        options: those of the run.
        output: folder of the run; it must not exist unless ``resume``.
        console: shows progress and tables.
        compare: ``uniform`` trains static LoRA with the same budget too; its result comes second.
        resume: continue from the last checkpoint in ``output``.
        sharding: how the processes hold the model; by default, each has all of it.

    Raises:
        DRLoRAError: the model, the data or the folder does not fit; nothing was overwritten.
        pydantic.ValidationError: impossible ranks or an impossible growth window.
        OSError: nothing can be written to ``output``.
    """
    everyone, output = join_processes(), agree_on(output)
    if not everyone.is_main_process:
        console = Console(quiet=True)
    sharding = sharding or Sharding()
    sharding.check(everyone.num_processes)
    batches = sharding.batches(everyone.num_processes)
    if resume:
        options = options.shared_by(batches, folder.read(output).processes)
    config = options.allocator_config()  # refuses an impossible window before anything is loaded
    with quiet_libraries():
        with console.status("loading model and data"):
            model = load_base(options, sharding)
            tokenizer = load_tokenizer(options.model)
            rows = load_rows(options)
        if "messages" in rows[0].column_names and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the data has messages, but {options.model!r} has no chat template; "
                "use prompt and completion, or an instruction-tuned model"
            )
        with _attached(model, options) as adapter:
            if not resume and everyone.is_main_process:
                begun = folder.SavedRun(options=options, compare=compare, processes=batches)
                folder.create(output, begun)
            everyone.wait_for_everyone()
            console.print(
                f"{options.model}: {len(rows[0])} training rows, {len(rows[1])} held out; "
                f"{options.steps} steps, mean rank {config.starting_rank} to {config.r_target} "
                f"(largest {config.r_max}) in {config.num_events} events; {adapter.storage}"
            )
            results = [_train(options, adapter, tokenizer, rows, output, console)]
        if compare is not None:
            static = options.uniform()
            with _attached(model, static) as adapter:
                results.append(_train(static, adapter, tokenizer, rows, output / compare, console))
    if everyone.is_main_process:
        text = json.dumps([each.model_dump() for each in results], indent=2)
        atomic.write_text(output / folder.RESULT, text + "\n")
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
        engine.record_to(None)


def _train(
    options: FinetuneOptions,
    adapter: Adapter,
    tokenizer: Any,
    rows: tuple[Any, Any],
    output: Path,
    console: Console,
) -> RunResult:
    """Train one method, or continue it from its last checkpoint, and write its files."""
    checkpoints, recording = output / folder.CHECKPOINTS, output / folder.RECORDING
    checkpoint = last_checkpoint(checkpoints)
    first = join_processes().is_main_process
    if first and checkpoint is None:  # a run that stopped before its first one starts again
        shutil.rmtree(recording, ignore_errors=True)
    if first:
        adapter.engine.record_to(recording)
    meter = Meter()
    progress = RichProgress(result.method_name(options.policy), options.steps, console)
    trainer = build_trainer(options, adapter, tokenizer, rows, checkpoints, [meter, progress])
    with console.status("held-out loss"):
        before = evaluate_first(trainer)
    with progress.bar:
        train(trainer, adapter, checkpoint)
    with console.status("held-out loss"):
        after = trainer.evaluate()
    if first or adapter.is_sharded:
        adapter.save_pretrained(output / folder.ADAPTER)
    if first:
        folder.write_metrics(output, trainer.state.log_history)
    ranks = {name: layer.tolist() for name, layer in adapter.ranks().items()}
    return RunResult(
        method=options.policy,
        loss_before=before,
        loss_after=after["eval_loss"],
        tokens_per_second=meter.tokens / meter.seconds if meter.tokens else None,
        seconds=meter.seconds,
        peak_memory_mb=meter.peak_memory_mb,
        memory_source=meter.memory_source,
        budget=sum(adapter.engine.budget(name) for name in ranks),
        total_rank=sum(map(sum, ranks.values())),
        skipped_steps=adapter.skipped_steps,
        ranks=ranks,
        files=[str(output / name) for name in (folder.ADAPTER, folder.METRICS, folder.RECORDING)],
    )
