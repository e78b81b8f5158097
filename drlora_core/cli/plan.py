"""``drlora plan``: layers, parameters, memory and timetable from a model's configuration."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.cli import common, plan_tables
from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, LayoutError, printable
from drlora_core.memory_forecast import BYTES, KERNELS, QUANTIZATIONS, RunOptions
from drlora_core.model_shape import ModelShape, read_json, read_model_config
from drlora_core.plan import make_plan
from drlora_core.timetable import TIMETABLES

SHAPE_READERS = "drlora.shapes"
DTYPES = ", ".join(BYTES)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's config.json, a folder with one, or (with Transformers) a hub id.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=10**9,
        help="Optimizer steps of the training: shows the timetable of drlora finetune --steps. "
        "[default: the timetable of the paper]",
    ),
]
Timetable = Annotated[
    str | None,
    typer.Option(help=f"With --steps: {' or '.join(TIMETABLES)}. [default: sprout]"),
]
RInit = Annotated[
    int | None,
    typer.Option(
        min=0, help="As -s r_init=N: rank at the start. [default: with --steps, by the timetable]"
    ),
]
RTarget = Annotated[int | None, typer.Option(min=1, help="As -s r_target=N: the mean at the end.")]
RMax = Annotated[int | None, typer.Option(min=1, help="As -s r_max=N: largest rank of an expert.")]
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
Tokens = Annotated[int, typer.Option(min=1, max=10**9, help="Tokens of one forward and backward.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing.")
]


def _size(text: str) -> Any:
    return typer.Option(min=1, help=text)


def plan(
    model: Model,
    steps: Steps = None,
    timetable: Timetable = None,
    r_init: RInit = None,
    r_target: RTarget = None,
    r_max: RMax = None,
    settings: common.Settings = None,
    allocator: common.ConfigFile = None,
    dtype: LoRADType = "float32",
    quantization: Storage = "none",
    base_dtype: BaseDType = "bfloat16",
    kernel: KernelName = "grouped",
    tokens: Tokens = 2048,
    checkpointing: Checkpointing = True,
    num_experts: Annotated[int | None, _size("Experts per MoE layer.")] = None,
    moe_layers: Annotated[int | None, _size("Number of MoE layers.")] = None,
    hidden_size: Annotated[int | None, _size("Input size of an expert.")] = None,
    intermediate_size: Annotated[int | None, _size("Inner size of an expert.")] = None,
    gated: Annotated[bool | None, typer.Option(help="Whether experts have a gate.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Forecast memory and growth of a fine-tune.

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
    ranks = {"r_init": r_init, "r_target": r_target, "r_max": r_max}
    config = _read_config(steps, timetable, _add_ranks(settings, ranks), allocator)
    sizes = {"num_experts": num_experts, "moe_layers": moe_layers, "hidden_size": hidden_size}
    sizes |= {"intermediate_size": intermediate_size, "gated": gated}
    given = {name: value for name, value in sizes.items() if value is not None}
    made = make_plan(_read_shape(model, given), config, run)
    if as_json:
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        common.emit({"steps": steps, **fields})
    else:
        plan_tables.show(made, steps, timetable or "sprout")


def _add_ranks(settings: list[str] | None, ranks: dict[str, int | None]) -> list[str]:
    """Add the options of their own to those of ``--set``."""
    words = list(settings or ())
    for name, value in ranks.items():
        if value is None:
            continue
        if any(word.partition("=")[0] == name for word in words):
            raise DRLoRAError(f"--{name.replace('_', '-')} and --set {name}: give one of them")
        words.append(f"{name}={value}")
    return words


def _read_config(
    steps: int | None, timetable: str | None, settings: list[str], allocator: Path | None
) -> AllocatorConfig:
    """Return the configuration; with ``steps``, that of a training with as many steps."""
    if steps is None:
        if timetable is not None:
            raise DRLoRAError(f"--timetable {timetable} needs --steps, the length of the training")
        return common.build_config({}, allocator, settings)
    if allocator is not None:
        raise DRLoRAError(
            f"--steps chooses when ranks grow, and so does --allocator {allocator}; leave one out"
        )
    chosen = common.choose("timetable", timetable or "sprout", TIMETABLES)
    fields = common.read_settings(settings)
    return AllocatorConfig.for_training(steps, timetable=chosen, **fields)


def _read_shape(model: str, given: dict[str, Any]) -> ModelShape:
    path = Path(model)
    if given or (reader := _load_reader()) is None:  # the reader imports Transformers
        return read_model_config(path, **given)
    if not path.exists() and is_hub_id(model):
        return reader(model)
    read_json(path)
    try:
        return reader(model)
    except DRLoRAError as error:
        try:
            shape = read_model_config(path)
        except DRLoRAError as own_error:
            raise LayoutError(f"{error}; by its fields alone: {own_error}") from error
        note = f"note: {error}; this plan uses the fields of config.json alone"
        typer.echo(printable(note), err=True)
        return shape


def is_hub_id(name: str) -> bool:
    """Return True if a name may be that of a model on a hub: NAME or OWNER/NAME.

    Example:
        >>> is_hub_id("Qwen/Qwen3-30B-A3B"), is_hub_id("./models/mine"), is_hub_id("config.json")
        (True, False, False)
    """
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and name[-5:] != ".json"


def _load_reader() -> Callable[[str], ModelShape] | None:
    """Load the reader that knows every family; None where its libraries are not installed."""
    for entry in importlib.metadata.entry_points(group=SHAPE_READERS):
        try:
            reader: Callable[[str], ModelShape] = entry.load()
        except ImportError:
            continue
        return reader
    return None
