"""``drlora plan``: layers, parameters, memory and timetable from a config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drlora_core.cli import common
from drlora_core.errors import DRLoRAError
from drlora_core.plan import ModelShape, Plan, make_plan, read_model_config
from drlora_core.plan.sizes import BYTES, DType

SHOWN_EVENTS = 12


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    config_json: Annotated[
        Path, typer.Argument(help="A model's config.json, or a directory that has one.")
    ],
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", help=common.SET_HELP)] = None,
    allocator: Annotated[
        Path | None, typer.Option(help="JSON file of the allocator's configuration.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the LoRA: " + ", ".join(BYTES))] = "float32",
    num_experts: Annotated[int | None, typer.Option(help="Experts per MoE layer.")] = None,
    moe_layers: Annotated[int | None, typer.Option(help="Number of MoE layers.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Input size of an expert.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Inner size of an expert.")] = None,
    gated: Annotated[bool | None, typer.Option(help="Whether experts have a gate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a fine-tune of a model will need and when its ranks will grow.

    Only the config.json is read: no weights, and no library that knows the model. The options
    about experts replace what the file says, or what cannot be read from it.
    """
    if dtype not in BYTES:
        raise DRLoRAError(f"--dtype {dtype}: accepted: {', '.join(BYTES)}")
    kind: DType = dtype  # type: ignore[assignment]
    shape = read_model_config(
        config_json,
        num_experts=num_experts,
        moe_layers=moe_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        gated=gated,
    )
    made = make_plan(shape, common.allocator({}, allocator, settings or []), kind)
    if as_json:
        common.emit(made.to_dict())
    else:
        _show(made)


def _show(made: Plan) -> None:
    _show_model(made.shape, made.slot_parameters)
    _show_memory(made)
    for size in made.timetable:
        _show_timetable(made, size)


def _show_model(shape: ModelShape, slot: int) -> None:
    experts = sorted(set(shape.experts.values()))
    common.say(
        f"{shape.model_type}: {len(shape.experts)} MoE layers of {shape.num_layers}, "
        f"{' or '.join(map(str, experts))} experts each, {shape.num_experts:,} in all; "
        f"{shape.expert_parameters():,} parameters in them"
    )
    sizes = ", ".join(f"{name} {i} -> {o}" for name, (i, o) in shape.projections().items())
    common.say(f"adapted: {sizes}; {slot:,} LoRA parameters per rank and expert")


def _show_memory(made: Plan) -> None:
    rows = [
        {
            "LoRA": way.name,
            "rank": way.rank,
            "parameters": way.parameters,
            "weights": common.binary(way.weights),
            "gradients": common.binary(way.gradients),
            "Adam": common.binary(way.adam),
            "total": common.binary(way.total),
        }
        for way in made.storages
    ]
    common.table(
        f"Memory of the LoRA ({made.dtype})",
        rows,
        f"PEFT builds on top {common.binary(made.peft_transient)} per layer at every forward: the "
        f"update of every expert. Base model and activations are not counted.",
    )


def _show_timetable(made: Plan, size: int) -> None:
    """Show the events of a layer of ``size`` experts."""
    rows = [
        {
            "event": event.index,
            "step": event.step,
            "quota per layer": event.quota,
            "layer total": event.total,
            "mean rank": event.mean,
        }
        for event in made.timetable[size]
    ]
    note = None
    if (left_out := len(rows) - SHOWN_EVENTS) > 0:
        rows = rows[: SHOWN_EVENTS // 2] + rows[-SHOWN_EVENTS // 2 :]
        note = f"{left_out} events in the middle are left out; --json has all"
    common.table(f"Growth of a layer of {size} experts (policy {made.config.policy})", rows, note)
    target, met = made.config.r_target, made.budget_met[size]
    goal = f"the budget of {size * target:,} per layer (mean rank {target})"
    if met is None:
        common.say(f"{goal} is never met with this quota")
    else:
        common.say(f"{goal} is met {f'at step {met}' if met else 'from the start'}")
