"""``drlora finetune``: train, or go on with a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from drlora_torch.errors import RunError
from drlora_torch.finetune import folder, launch
from drlora_torch.finetune.options import FinetuneOptions, embedded_defaults
from drlora_torch.finetune.sharding import Sharding
from drlora_torch.finetune.signature import add_finetune_options


@add_finetune_options
def finetune(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run, which must not exist. [default: runs/TIME]"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this folder, with the options saved there."),
    ] = None,
    compare: Annotated[
        Literal["uniform"] | None, typer.Option(help="Also train static LoRA with the same budget.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes on this machine, one for each GPU. [default: 1; at least 1]"
        ),
    ] = None,
    **options: Any,
) -> None:
    """Fine-tune a mixture-of-experts model; without arguments, the small one that is shipped."""
    # A flag that is not given is None or False, depending on the version of click.
    chosen = {n: v for n, v in options.items() if v is not None and v is not False}
    sizes = {name: chosen.pop(name) for name in Sharding.model_fields if name in chosen}
    sharding = Sharding.model_validate(sizes)
    if resume is not None:
        run = _read_unfinished(resume, chosen | {"output": output, "compare": compare})
    elif "model" in chosen and "data" not in chosen:
        raise RunError("a MODEL needs DATA: drlora finetune MODEL DATA --output DIR")
    else:
        shipped = {} if "model" in chosen else embedded_defaults()
        values = FinetuneOptions.model_validate({**shipped, **chosen})
        run = folder.SavedRun(options=values, compare=compare)
    target = resume or output or Path("runs", time.strftime("finetune-%Y%m%d-%H%M%S"))
    if launch.must_launch(processes):
        _refuse_early(run, target, processes, sharding, resume is not None)
        words = launch.finetune_arguments(chosen, sharding, target, compare, resume is not None)
        launch.launch(processes, words, target, sharding)

    from drlora_torch.finetune import job

    job.run(
        run.options,
        target,
        Console(),
        compare=run.compare,
        resume=resume is not None,
        sharding=sharding,
    )


def _refuse_early(
    run: folder.SavedRun, target: Path, processes: int, sharding: Sharding, resume: bool
) -> None:
    """Refuse what the processes of a run would refuse, before they are started."""
    run.options.allocator_config()
    sharding.check(processes)
    if resume:
        run.options.shared_by(sharding.batches(processes), run.processes)
    else:
        folder.refuse_existing(target)


def _read_unfinished(path: Path, chosen: dict[str, Any]) -> folder.SavedRun:
    if given := sorted(name for name, value in chosen.items() if value is not None):
        raise RunError(f"--resume uses the options of the run; leave out {', '.join(given)}")
    run = folder.read(path)
    if (path / folder.RESULT).is_file():
        raise RunError(f"the run in {str(path)!r} is finished; see its {folder.RESULT}")
    return run
