"""What ``drlora plan`` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from drlora_core.cli.common import format_bytes
from drlora_core.cli.console import say
from drlora_core.cli.tables import show_table
from drlora_core.memory_forecast import MemoryForecast, RunOptions
from drlora_core.plan import Plan

SHOWN_EVENTS = 12
SIZES = ("weights", "gradients", "adam", "total")


def show(made: Plan, steps: int | None, timetable: str) -> None:
    """Print a plan; ``steps`` of the training, by whose timetable ranks grow, or None."""
    shape = made.shape
    total = shape.total_parameters
    say(
        f"{shape.model_type}: {len(shape.layers)} MoE layers of {shape.num_layers}, "
        f"{' or '.join(map(str, made.timetable))} experts each, "
        f"{sum(layer.num_experts for layer in shape.layers):,} in all; "
        f"{made.expert_parameters:,} parameters in them"
        + (f", {total:,} in the model" if total else "")
    )
    adapted = {
        ", ".join(f"{name} {i} -> {o}" for name, (i, o) in layer.projections.items())
        + f"; {layer.slot_parameters:,} LoRA parameters per rank and expert"
        for layer in shape.layers
    }
    for line in sorted(adapted):
        say(f"adapted: {line}")
    rows: list[dict[str, Any]] = [dataclasses.asdict(storage) for storage in made.storages]
    for row in rows:
        row |= {name: format_bytes(row[name]) for name in SIZES}
    show_table(
        f"Memory of the LoRA ({made.dtype})",
        rows,
        f"PEFT also builds the update of every expert at each forward: "
        f"{format_bytes(made.peft_transient)} per layer.",
        figures=SIZES,
        spare=("gradients", "adam", "parameters"),
    )
    _show_memory(made.memory)
    say(_describe_timetable(made, steps, timetable))
    for size in made.timetable:
        _show_timetable(made, size)


def _show_memory(memory: MemoryForecast) -> None:
    run = memory.options
    at_once = "up to 1 GiB of weights" if run.kernel == "grouped" else "one expert"
    recomputed = "with" if run.checkpointing else "without"
    parts: dict[str, tuple[str, int | None]] = {
        "expert weights": (_storage(run), memory.experts),
        "rest of the base": (run.base_dtype, memory.rest),
        "LoRA": (f"{run.lora_dtype}, layout pooled", memory.lora),
        "gradients": (run.lora_dtype, memory.gradients),
        "optimizer": (f"Adam, two moments in {run.lora_dtype}", memory.optimizer),
        "unpacked experts": (f"kernel {run.kernel}: {at_once} at a time", memory.unpacked),
        "activations": (
            f"estimate, {run.tokens:,} tokens, {recomputed} gradient checkpointing",
            memory.activations,
        ),
        "total": ("", memory.total),
    }
    if run.quantization == "none":
        del parts["unpacked experts"]
    rows = [
        {"part": part, "how": how, "size": None if size is None else format_bytes(size)}
        for part, (how, size) in parts.items()
    ]
    show_table("Memory of the run", rows, _left_out(memory), figures=("size",))


def _storage(run: RunOptions) -> str:
    if run.quantization in ("nf4", "fp4"):
        return f"{run.quantization}, double quantization"
    return run.base_dtype if run.quantization == "none" else run.quantization


def _left_out(memory: MemoryForecast) -> str:
    notes = []
    if memory.rest is None:
        notes.append(
            "The rest of the base is not counted: only the fields of config.json were read."
        )
    if memory.activations is None:
        notes.append("Activations are not counted: the file does not say what a token takes.")
    return " ".join([*notes, "What libraries and the allocator of the device take is not counted."])


def _describe_timetable(made: Plan, steps: int | None, timetable: str) -> str:
    if steps is None:
        return (
            f"these events are of a training of {made.config.growth_end:,} steps or more; "
            "--steps N shows those of drlora finetune --steps N"
        )
    return f"timetable {timetable} of {steps:,} steps, as of drlora finetune --steps {steps}"


def _show_timetable(made: Plan, size: int) -> None:
    rows = [dataclasses.asdict(event) for event in made.timetable[size]]
    if made.config.policy != "move":
        rows = [{name: row[name] for name in row if name != "most_moved"} for row in rows]
    note = None
    if (left_out := len(rows) - SHOWN_EVENTS) > 0:
        rows = rows[: SHOWN_EVENTS // 2] + rows[-SHOWN_EVENTS // 2 :]
        note = f"{left_out} events in the middle are left out; --json has all"
    show_table(f"Growth of a layer of {size} experts (policy {made.config.policy})", rows, note)
    target, met = made.config.r_target, made.budget_met[size]
    special = {None: "never met with this quota", 0: "met from the start"}
    when = special.get(met, f"met at step {met}")
    say(f"the budget of {size * target:,} per layer (mean rank {target}) is {when}")
