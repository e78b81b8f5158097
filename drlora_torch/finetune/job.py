"""Run the main job from options to files."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from drlora_core import AllocatorEngine
from drlora_core.recording import RecordingWriter
from drlora_torch.adapter import Adapter
from drlora_torch.api import attach
from drlora_torch.finetune import data, folder, model, result
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.progress import RichProgress, silence
from drlora_torch.finetune.result import RunResult
from drlora_torch.models.discovery import choose_layers, discover

# Errors of `datasets` reach us as exceptions, and are said once, by us.
LOUD = {"trl": logging.ERROR, "accelerate": logging.ERROR, "datasets": logging.CRITICAL}
FILES = (folder.ADAPTER, folder.METRICS, folder.RECORDING)


def run(
    options: FinetuneOptions,
    output: Path,
    console: Console,
    *,
    compare: str | None = None,
    resume: bool = False,
) -> list[RunResult]:
    """Fine-tune, evaluate, save and show; with ``compare="uniform"`` static LoRA as well.

    Args:
        options: what to do.
        output: folder of the run; must not exist unless ``resume``.
        console: where progress and tables go.
        compare: a second method to train at the same budget.
        resume: go on from the last checkpoint in ``output``.

    Returns:
        The result of each method, the main one first.

    Raises:
        DRLoRAError: model, data, configuration or folder do not fit; nothing was overwritten.
    """
    config = options.allocator_config()  # refuse an impossible window before anything is loaded
    with _quiet():
        with console.status("loading model and data"):
            loaded, tokenizer = model.load(options)
            choose_layers(loaded, discover(loaded))
            rows = data.load_rows(options)
        data.check_template(rows[0], tokenizer, options.model)
        if not resume:
            folder.create(output, options, compare)
        console.print(
            f"{options.model}: {len(rows[0])} rows to train on, {len(rows[1])} held out; "
            f"{options.steps} steps, rank {config.starting_rank} to {config.r_target} on average "
            f"(at most {config.r_max}) in {config.num_events} events"
        )
        results = [_train(options, loaded, tokenizer, rows, output, console)]
        if compare is not None:
            other = options.uniform()
            results.append(_train(other, loaded, tokenizer, rows, output / compare, console))
    folder.write_json(output / folder.RESULT, [each.model_dump() for each in results])
    result.show(console, results, output)
    return results


def _train(
    options: FinetuneOptions,
    loaded: nn.Module,
    tokenizer: Any,
    rows: tuple[Any, Any],
    output: Path,
    console: Console,
) -> RunResult:
    """Train one method; the model leaves as it came."""
    from drlora_torch.finetune.training import build_trainer

    adapter = attach(
        loaded,
        AllocatorEngine(options.allocator_config()),
        alpha=options.alpha,
        router=options.router,
        layout=options.layout,
        dropout=options.dropout,
    )
    recorder = RecordingWriter(output / folder.RECORDING, adapter.engine, policy=options.policy)
    adapter.engine.record_to(recorder)
    progress = RichProgress(result.method_name(options.policy), console)
    try:
        checkpoints = output / folder.CHECKPOINTS
        trainer = build_trainer(options, adapter, tokenizer, rows, checkpoints, [progress])
        trainer.recorder = recorder
        silence(trainer)
        before = _held_out_loss(trainer, console)
        started = time.perf_counter()
        last = folder.last_checkpoint(output)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.perf_counter() - started
        after = _held_out_loss(trainer, console)
        adapter.save_pretrained(output / folder.ADAPTER)
        folder.write_metrics(output / folder.METRICS, trainer.state.log_history)
        tokens = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
        return RunResult(
            method=options.policy,
            loss_before=before,
            loss_after=after,
            tokens_per_second=max(tokens, default=0.0) / seconds,
            seconds=seconds,
            peak_memory_mb=result.peak_memory_mb(),
            files=[str(output / name) for name in FILES],
            **_allocation(adapter),
        )
    finally:
        progress.close()
        adapter.engine.record_to(None)
        adapter.detach()


def _held_out_loss(trainer: Any, console: Console) -> float:
    with console.status("held-out loss"):
        return float(trainer.evaluate()["eval_loss"])


def _allocation(adapter: Adapter) -> dict[str, Any]:
    """The fields of a result that tell of ranks."""
    ranks = {name: layer.tolist() for name, layer in adapter.ranks().items()}
    return {
        "budget": sum(adapter.engine.budget(name) for name in ranks),
        "total_rank": sum(map(sum, ranks.values())),
        "skipped_steps": adapter.skipped_steps,
        "ranks": ranks,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own bars and notices out of the output; errors still come through."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    before = {name: logging.getLogger(name).level for name in LOUD}
    for name, level in LOUD.items():
        logging.getLogger(name).setLevel(level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
            datasets.enable_progress_bars()
            transformers_logging.enable_progress_bar()
