"""Run a fine-tuning job, from its recipe to the files in its folder."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from rich.console import Console
from torch import nn

from drlora_core import atomic
from drlora_core.cli.console import say
from drlora_core.locks import FolderLock
from drlora_core.report import write_report
from drlora_core.runs import open_run
from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import NotFiniteError, RunError
from drlora_torch.finetune import folder, result, starting
from drlora_torch.finetune.data import summary
from drlora_torch.finetune.data.prepare import Prepared
from drlora_torch.finetune.inputs import load_data
from drlora_torch.finetune.model import load_base
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.processes import agree_on, join_processes
from drlora_torch.finetune.recipe import Recipe
from drlora_torch.finetune.result import RunResult
from drlora_torch.finetune.training import (
    build_trainer,
    check_reporters,
    evaluate_first,
    read_state,
    train,
)
from drlora_torch.finetune.watch.meter import Meter
from drlora_torch.finetune.watch.metrics_file import MetricsFile
from drlora_torch.finetune.watch.progress import RichProgress, quiet_libraries
from drlora_torch.finetune.watch.stopping import (
    Diverged,
    StopOnSignal,
    Stopped,
    StopWhenDeleted,
    StopWhenDiverged,
)
from drlora_torch.integrations.trainer import last_checkpoint
from drlora_torch.storage.checkpoint import check_restorable
from drlora_torch.storage.checkpoint import read as read_adapter


class Job(NamedTuple):
    """What the trainings of a run share."""

    recipe: Recipe
    output: Path
    console: Console
    everyone: PartialState
    tokenizer: Any
    data: Prepared
    stop: StopOnSignal

    @property
    def go_on(self) -> str:
        """The command that goes on with the run."""
        own = self.recipe.processes or 1
        words = [f"--processes {own}"] if own > 1 else []
        words = [shlex.quote(str(self.output)), *words, *self.recipe.sharding.words]
        return f"drlora finetune --resume {' '.join(words)}"


def run(recipe: Recipe, output: Path, console: Console, *, resume: bool = False) -> list[RunResult]:
    """Fine-tune, evaluate, save and print the results.

    Where torchrun or Accelerate has started several processes, each trains on its share of every
    batch, and the first one writes and prints. A run may go on in another number of processes, and
    with another sharding: a step has as many rows as before.

    Args:
        recipe: of the run; with ``resume``, the one in its folder, whose number of steps may be
            larger now.
        output: folder of the run; it must not exist unless ``resume``.
        console: shows progress and tables.
        resume: continue from the last checkpoint in ``output``.

    Returns:
        The result; with ``compare``, that of static LoRA comes second.

    Raises:
        DRLoRAError: the model, the data or the folder does not fit, and nothing was written; or
            the training has diverged or was told to stop, and the last checkpoint is kept.
        pydantic.ValidationError: impossible ranks or an impossible growth window.
        OSError: nothing can be written to ``output``.
    """
    everyone, output = join_processes(), agree_on(output)
    if not everyone.is_main_process:
        console = Console(quiet=True)
    recipe.sharding.check(everyone.num_processes)
    saved = folder.read(output) if resume else recipe
    recipe = recipe.model_copy(update={"processes": everyone.num_processes})
    options = recipe.options
    if resume:
        options = options.shared_by(recipe.different_batches, saved.different_batches)
    else:
        folder.refuse_existing(output)
        options = starting.adopt(options)
    check_reporters(options.report_to)
    with quiet_libraries():
        options, tokenizer, data = load_data(options, recipe.different_batches, console)
        if resume:
            summary.check_same(output, data.summary)
        with console.status("loading the model"):
            model = load_base(options, recipe.sharding)
        stop = StopOnSignal(everyone.num_processes, everyone.device)
        recipe = recipe.model_copy(update=options.model_dump())
        job = Job(recipe, output, console, everyone, tokenizer, data, stop)
        with stop.listening(), _on_failure(_remove_remains, job):
            results = _train_all(job, model, options, resume)
            if everyone.is_main_process:
                folder.check_there(output)
    if everyone.is_main_process:
        text = json.dumps([each.model_dump() for each in results], indent=2)
        atomic.write_text(output / folder.RESULT, text + "\n")
    page = _write_page(job) if everyone.is_main_process else None
    result.show(console, results, output, page)
    return results


def _write_page(job: Job) -> Path | None:
    """Write the report of a finished run; an error there costs the page alone, and is said."""
    if not (job.output / folder.RECORDING).exists():
        return None  # the run has said so
    try:
        with job.console.status("report"):
            return write_report(open_run(job.output))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        again = f"drlora report {shlex.quote(str(job.output))}"
        say(f"no report was written: {reason}. To try again: {again}", job.console)
        return None


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Refuse to train into a folder into which another process trains."""
    try:
        lock = FolderLock(output)
    except BlockingIOError:
        raise RunError(
            f"another process trains into {str(output)!r}; wait until it has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _on_failure(clean: Callable[[Job], None], job: Job) -> Iterator[None]:
    """Clean up after an error; a run that was told to stop has none."""
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        clean(job)
        raise


def _remove_new(job: Job) -> None:
    """Remove the folder that this process has made, of a run that has not trained yet."""
    if not job.stop.began:
        shutil.rmtree(job.output, ignore_errors=True)


def _remove_remains(job: Job) -> None:
    """Remove what was written to a run after somebody had deleted it."""
    if job.stop.began and job.everyone.is_main_process:
        folder.remove_remains(job.output)


def _train_all(
    job: Job, model: nn.Module, options: FinetuneOptions, resume: bool
) -> list[RunResult]:
    """Train the method of the recipe, and the one to compare it with."""
    with contextlib.ExitStack() as whole:
        with _attached(model, options) as adapter:
            _open_folder(job, adapter, resume, whole)
            _tell(job, adapter)
            results = [_train(job, options, adapter, job.output)]
        if job.recipe.compare is not None:
            static = options.uniform()
            with _attached(model, static) as adapter:
                results.append(_train(job, static, adapter, job.output / job.recipe.compare))
        return results


def _open_folder(job: Job, adapter: Adapter, resume: bool, whole: contextlib.ExitStack) -> None:
    """Make the folder of a new run, now that nothing stands in its way, or take up an old one."""
    job.everyone.wait_for_everyone()  # each has looked whether the folder exists
    if job.everyone.is_main_process:
        if not resume:
            folder.create(job.output, job.recipe)
            whole.enter_context(_on_failure(_remove_new, job))
        whole.enter_context(_alone(job.output))
        if resume:
            atomic.sweep(job.output)
            _check_restorable(job, adapter)
            folder.extend(job.output, job.recipe)
        summary.write(job.output, job.data.summary)
    job.everyone.wait_for_everyone()


def _tell(job: Job, adapter: Adapter) -> None:
    """Say what is trained on, and what is trained."""
    recipe, config = job.recipe, adapter.engine.config
    rows = recipe.batch_size * recipe.accumulation * recipe.different_batches
    steps, sequences = recipe.options.planned_steps, job.data.sequences
    summary.show(job.console, job.data.summary, steps, rows, sequences)
    if recipe.method == "dpo" and recipe.adapter is not None:
        say("the reference of dpo is the base model, not the adapter to start from", job.console)
    say(
        f"{recipe.model}: {recipe.steps} steps, mean rank {config.starting_rank} to "
        f"{config.r_target} (largest {config.r_max}) in {config.num_events} events; "
        f"{adapter.storage}\n{result.trained_parameters(adapter)}",
        job.console,
    )


def _check_restorable(job: Job, adapter: Adapter) -> None:
    """Refuse a checkpoint that does not fit, before anything in the folder changes."""
    checkpoint = last_checkpoint(job.output / folder.CHECKPOINTS)
    if checkpoint is not None and not adapter.is_sharded:
        saved = read_adapter(Path(checkpoint))
        check_restorable(state_of(adapter), saved, check_base=True)


@contextlib.contextmanager
def _attached(model: nn.Module, options: FinetuneOptions) -> Iterator[Adapter]:
    """Attach an adapter; on leaving, the model is as before."""
    adapter = starting.start(model, options)
    engine = adapter.engine
    try:
        yield adapter
    finally:
        adapter.detach()
        engine.record_to(None)


def _train(job: Job, options: FinetuneOptions, adapter: Adapter, output: Path) -> RunResult:
    """Train one method, or continue it from its last checkpoint, and write its files."""
    checkpoints, recording = output / folder.CHECKPOINTS, output / folder.RECORDING
    checkpoint = last_checkpoint(checkpoints)
    first = job.everyone.is_main_process
    if first and checkpoint is None:  # a run that stopped before its first one starts again
        shutil.rmtree(recording, ignore_errors=True)
    meter = Meter()
    label, steps = result.method_name(options.policy), options.planned_steps
    progress = RichProgress(label, steps, job.console, meter)
    callbacks: list[Any] = [meter, progress, StopWhenDiverged(), job.stop]
    if first:
        callbacks.append(StopWhenDeleted(functools.partial(folder.check_there, job.output)))
        if adapter.engine.step_count == 0:  # a replay starts from equal ranks
            adapter.engine.record_to(recording)
        else:
            job.console.print("no recording: this run starts from the ranks of an adapter")
        state = read_state(checkpoint)
        output.mkdir(exist_ok=True)
        callbacks.append(MetricsFile(output / folder.METRICS, state))
    trainer = build_trainer(
        options, adapter, job.tokenizer, job.data, checkpoints, output / folder.LOGS, callbacks
    )
    with job.console.status("held-out loss"):
        before = evaluate_first(trainer)
    job.stop.check(job.go_on)
    try:
        with progress.bar:
            train(trainer, adapter, checkpoint)
        job.stop.check(job.go_on)
        with job.console.status("held-out loss"):
            after = trainer.evaluate()
        if first or adapter.is_sharded:
            adapter.save_pretrained(output / folder.ADAPTER)
    except NotFiniteError as error:
        raise Diverged(f"{error}; the last checkpoint is kept") from error
    return result.collect(options.policy, adapter, meter, before, after["eval_loss"], output)
