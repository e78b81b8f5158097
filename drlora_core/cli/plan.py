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
from drlora_core.memory_forecast import (
    BYTES,
    KERNELS,
    QUANTIZATIONS,
    MemoryForecast,
    RunOptions,
)
from drlora_core.model_shape import ModelShape, read_json, read_model_config
from drlora_core.plan import Plan, make_plan

SHOWN_EVENTS = 12
SIZES = ("weights", "gradients", "adam", "total")
SHAPE_READERS = "drlora.shapes"


DTYPES = ", ".join(BYTES)
LoRADType = Annotated[str, typer.Option(help=f"Type of the LoRA: {DTYPES}.")]
Storage = Annotated[
    str, typer.Option(help=f"How the experts are stored: {', '.join(QUANTIZATIONS)}.")
]
BaseDType = Annotated[
    str,
    typer.Option(help=f"Type of the rest of the base, and of experts with none: {DTYPES}."),
]
KernelName = Annotated[
    str, typer.Option(help="Which code multiplies the experts: grouped (GPUs) or ragged (CPUs).")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of one forward and backward.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing.")
]


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
    dtype: LoRADType = "float32",
    quantization: Storage = "none",
    base_dtype: BaseDType = "bfloat16",
    kernel: KernelName = "grouped",
    tokens: Tokens = 2048,
    checkpointing: Checkpointing = True,
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
    run = RunOptions(
        lora_dtype=common.choose("dtype", dtype, BYTES),
        quantization=common.choose("quantization", quantization, QUANTIZATIONS),
        base_dtype=common.choose("base-dtype", base_dtype, BYTES),
        kernel=common.choose("kernel", kernel, KERNELS),
        tokens=tokens,
        checkpointing=checkpointing,
    )
    options = {"num_experts": num_experts, "moe_layers": moe_layers, "hidden_size": hidden_size}
    options |= {"intermediate_size": intermediate_size, "gated": gated}
    given = {name: value for name, value in options.items() if value is not None}
    made = make_plan(_read_shape(model, given), common.build_config({}, allocator, settings), run)
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
        f"{common.format_bytes(made.peft_transient)} per layer.",
    )
    _show_memory(made.memory)
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
        {"part": part, "how": how, "size": None if size is None else common.format_bytes(size)}
        for part, (how, size) in parts.items()
    ]
    common.table("Memory of the run", rows, _left_out(memory))


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
