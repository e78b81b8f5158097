"""``drlora plan``: layers, parameters, memory and timetable from a model's configuration."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.cli import common
from drlora_core.errors import DRLoRAError, LayoutError
from drlora_core.model_shape import ModelShape, read_json, read_model_config
from drlora_core.plan import BYTES, DType, Plan, make_plan

SHOWN_EVENTS = 12
SIZES = ("weights", "gradients", "adam", "total")
SHAPE_READERS = "drlora.shapes"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_JSON",
            help="A model's config.json, a directory with one, or (with Transformers) a hub id.",
        ),
    ],
    settings: common.Settings = None,
    allocator: common.ConfigFile = None,
    dtype: Annotated[str, typer.Option(help="Type of the LoRA: " + ", ".join(BYTES))] = "float32",
    num_experts: Annotated[int | None, typer.Option(help="Experts per MoE layer.")] = None,
    moe_layers: Annotated[int | None, typer.Option(help="Number of MoE layers.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Input size of an expert.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Inner size of an expert.")] = None,
    gated: Annotated[bool | None, typer.Option(help="Whether experts have a gate.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Show what a fine-tune of a model will need and when its ranks will grow.

    No weights are loaded. Where Transformers is installed, every family that it knows can be
    planned; elsewhere those with the usual field names. The options about experts replace what the
    file says; with one of them, Transformers is not used.
    """
    if dtype not in BYTES:
        raise DRLoRAError(f"--dtype {dtype}: accepted: {', '.join(BYTES)}")
    kind: DType = dtype  # type: ignore[assignment]
    options = {"num_experts": num_experts, "moe_layers": moe_layers, "hidden_size": hidden_size}
    options |= {"intermediate_size": intermediate_size, "gated": gated}
    given = {name: value for name, value in options.items() if value is not None}
    made = make_plan(_read_shape(model, given), common.build_config({}, allocator, settings), kind)
    if as_json:
        common.emit(made)
    else:
        _show(made)


def _read_shape(model: str, given: dict[str, Any]) -> ModelShape:
    path, reader = Path(model), _load_reader()
    if reader is None or given:
        return read_model_config(path, **given)
    if not (path.exists() or path.suffix == ".json"):
        return reader(model)  # a hub id
    read_json(path)
    try:
        return reader(model)
    except DRLoRAError as error:
        try:
            shape = read_model_config(path)
        except DRLoRAError as own_error:
            raise LayoutError(f"{error}; by its fields alone: {own_error}") from error
        typer.echo(f"note: {error}; this plan uses the fields of config.json alone", err=True)
        return shape


def _load_reader() -> Callable[[str], ModelShape] | None:
    """Load the reader that knows every family; None where its libraries are not installed."""
    for entry in importlib.metadata.entry_points(group=SHAPE_READERS):
        try:
            reader: Callable[[str], ModelShape] = entry.load()
        except ImportError:
            continue
        return reader
    return None


def _show(made: Plan) -> None:
    shape = made.shape
    total = shape.total_parameters
    common.say(
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
        common.say(f"adapted: {line}")
    rows: list[dict[str, Any]] = [dataclasses.asdict(storage) for storage in made.storages]
    for row in rows:
        row |= {name: common.format_bytes(row[name]) for name in SIZES}
    common.table(
        f"Memory of the LoRA ({made.dtype})",
        rows,
        f"PEFT also builds the update of every expert at each forward: "
        f"{common.format_bytes(made.peft_transient)} per layer. Base model and activations are "
        f"not counted.",
    )
    for size in made.timetable:
        _show_timetable(made, size)


def _show_timetable(made: Plan, size: int) -> None:
    rows = [dataclasses.asdict(event) for event in made.timetable[size]]
    note = None
    if (left_out := len(rows) - SHOWN_EVENTS) > 0:
        rows = rows[: SHOWN_EVENTS // 2] + rows[-SHOWN_EVENTS // 2 :]
        note = f"{left_out} events in the middle are left out; --json has all"
    common.table(f"Growth of a layer of {size} experts (policy {made.config.policy})", rows, note)
    target, met = made.config.r_target, made.budget_met[size]
    special = {None: "never met with this quota", 0: "met from the start"}
    when = special.get(met, f"met at step {met}")
    common.say(f"the budget of {size * target:,} per layer (mean rank {target}) is {when}")
