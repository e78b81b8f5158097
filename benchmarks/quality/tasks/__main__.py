"""``python -m benchmarks.quality.tasks``: examples of every task, and statistics of its routing."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.quality.models import load_model
from benchmarks.quality.profiling import routing_profile
from benchmarks.quality.routing import Routing, distance, entropy
from benchmarks.quality.rows import encode
from benchmarks.quality.tasks import CONTROLLED, DEVELOPMENT, HELD_OUT, load_task

CONSOLE = Console(width=120)


def entropy_table(routing: dict[str, Routing], model: str) -> Table:
    """Normalised entropy of the routing, by task and layer."""
    layers = list(next(iter(routing.values())))
    table = Table(title=f"{model}: entropy of routing (1: all experts equally)")
    table.add_column("task")
    for number in range(len(layers)):
        table.add_column(f"layer {number}", justify="right")
    for name, found in routing.items():
        table.add_row(name, *(f"{entropy(found[layer]):.3f}" for layer in layers))
    return table


def distance_table(routing: dict[str, Routing], model: str) -> Table:
    """Distance between the routings of any two tasks."""
    table = Table(title=f"{model}: total variation between the routing of two tasks")
    table.add_column("task")
    for name in routing:
        table.add_column(name, justify="right")
    for name, found in routing.items():
        table.add_row(name, *(f"{distance(found, other):.3f}" for other in routing.values()))
    return table


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="Models to measure; embedded and qwen by default.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks, names or .jsonl files; all by default.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rows to show of each task.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Test rows to measure routing on.")] = 200,
) -> None:
    """Show the tasks and how the frozen models route them."""
    named = task or [*DEVELOPMENT, *HELD_OUT, *(CONTROLLED if model == ["controlled"] else ())]
    tasks = {name: load_task(name) for name in named}
    for name, found in tasks.items():
        sizes = ", ".join(f"{split} {len(part)}" for split, part in found.splits.items())
        CONSOLE.print(f"[bold]{name}[/bold] ({sizes})")
        for row in found.train[:examples]:
            CONSOLE.print(f"  {row['prompt']!r} {row['completion']!r}", markup=False)
    for name in model or ["embedded", "qwen"]:
        loaded, tokenizer = load_model(name)
        encoded = {t: encode(tokenizer, tasks[t].test[:rows], max_tokens=256) for t in tasks}
        padding = tokenizer.pad_token_id
        routing = {t: routing_profile(loaded, encoded[t], 32, padding) for t in tasks}
        CONSOLE.print(entropy_table(routing, name), distance_table(routing, name))


if __name__ == "__main__":
    typer.run(main)
