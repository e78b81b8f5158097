"""``drlora finetune``: train, or go on with a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.cli.console import make_console
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder, launch
from drlora_torch.finetune.recipe import Recipe, combine
from drlora_torch.finetune.sharding import Sharding
from drlora_torch.finetune.signature import add_finetune_options


@add_finetune_options
def finetune(
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options; those of the command line win.",
            rich_help_panel="Run",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder; with more --steps, a finished one too.",
            rich_help_panel="Run",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Fine-tune an MoE model on your data.

    Without arguments, it trains the small model that is shipped, on a task that it has not seen.
    Values come from the command line, then from --config, then from the defaults.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        recipe, target = _resumed(resume, chosen, config), resume
    else:
        recipe = combine(chosen, config)
        target = Path(recipe.output or time.strftime("runs/finetune-%Y%m%d-%H%M%S"))
        folder.refuse_existing(target)
    if launch.must_launch(recipe.processes):
        assert recipe.processes is not None
        recipe.options.resolved(None).allocator_config()  # refused before processes are started
        recipe.sharding.check(recipe.processes)
        words = launch.finetune_arguments(chosen, config, target, resume is not None)
        launch.launch(recipe.processes, words, target, recipe.sharding)

    from drlora_torch.finetune import job

    job.run(recipe, target, make_console(), resume=resume is not None)


def _resumed(path: Path, chosen: dict[str, Any], config: Path | None) -> Recipe:
    """Read the recipe of a run that goes on, perhaps to a later step and in other processes."""
    places = {"processes", *Sharding.model_fields}
    refused = sorted(chosen.keys() - {*folder.RESUMABLE, *places}) + (["config"] if config else [])
    if refused:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        raise RunError(f"--resume uses the options of the run; leave out {words}")
    saved = folder.read(path)
    if launch.must_launch(chosen.get("processes")):
        batches = Sharding.model_validate(
            {n: v for n, v in chosen.items() if n in Sharding.model_fields}
        ).batches(chosen["processes"])
        saved.options.shared_by(batches, saved.different_batches)
    sizes = dict.fromkeys(Sharding.model_fields, 1) | {"processes": None}
    recipe = Recipe.model_validate({**saved.model_dump(), **sizes, **chosen})
    finished, steps = (path / folder.RESULT).is_file(), saved.options.planned_steps
    if recipe.options.planned_steps < steps:
        raise RunError(
            f"--steps {recipe.steps}: the run has {steps} steps already planned; use more"
        )
    if finished and recipe.steps == saved.steps:
        raise RunError(
            f"the run in {str(path)!r} is finished; see its {folder.RESULT}, or go on with more "
            f"--steps than {steps}"
        )
    return recipe
