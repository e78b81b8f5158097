"""The page of results: a section for each model, which a new run replaces."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from benchmarks.report import Table, processor, threads, versions
from benchmarks.scale.running import Result
from drlora_core.atomic import write_text
from drlora_core.cli.common import format_bytes

TITLE = "# Training at full size"
ABOUT = (
    "Models of the full architecture of real ones, with random weights, on CPUs: three training "
    "steps with gradient checkpointing and one growth event; then the adapter is saved, detached "
    "and loaded. `python -m benchmarks.scale --model NAME` writes a section. *Forecast* is what "
    "`drlora plan` says. *Measured* is the bytes of tensors, except for the last two lines, which "
    "the operating system counts: the resident memory of the process."
)


def section(heading: str, result: Result, returned: int) -> str:
    """The section of a model, in Markdown; freed blocks of ``returned`` MiB go back at once."""
    lines = [f"## {heading}", "", _summary(result), ""]
    for table in (_memory(result), _stages(result)):
        lines += table.lines()
    date = datetime.date.today().isoformat()
    lines += [f"{processor()}{threads()}; {date}.", ""]
    malloc = f"MALLOC_MMAP_THRESHOLD_={returned * 2**20}" if returned else "malloc as it is"
    lines += [f"{versions('numpy', 'torch', 'transformers', 'bitsandbytes')}; {malloc}."]
    return "\n".join(lines) + "\n"


def _summary(result: Result) -> str:
    run, (lowest, highest, total) = result.forecast.options, result.ranks
    experts = run.base_dtype if run.quantization == "none" else run.quantization
    losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
    compared = "the same, bit for bit" if result.same_logits else "NOT the same"
    return (
        f"{result.parameters:,} parameters; experts {experts}, everything else "
        f"{run.base_dtype}; LoRA {run.lora_dtype}; {run.tokens} tokens a step. Losses: {losses}. "
        f"{result.events} growth event, after which experts have rank {lowest} to {highest}, "
        f"{total:,} in all. Logits before saving and after loading are {compared}; the adapter "
        f"changes a logit by up to {result.effect:.3g}."
    )


def _memory(result: Result) -> Table:
    planned, found, meter = result.forecast, result.parts, result.meter
    transient = planned.unpacked + (planned.activations or 0)
    last = [stage for stage in meter.stages if stage.name.startswith("step")][-1]
    rows = [
        ("expert weights", planned.experts, found.experts),
        ("rest of the base", planned.rest or 0, found.rest),
        ("LoRA", planned.lora, found.lora),
        ("gradients", planned.gradients, found.gradients),
        ("optimizer", planned.optimizer, found.optimizer),
        (
            "unpacked experts and activations (resident, peak of the last step)",
            transient,
            last.peak - last.before - found.gradients,
        ),
        (
            "total (resident, peak of all steps, without the libraries)",
            planned.total,
            meter.peak("step") - meter.start,
        ),
    ]
    cells = [
        [part, format_bytes(ahead), format_bytes(size), f"{size / ahead:.3f}" if ahead else "-"]
        for part, ahead, size in rows
    ]
    return Table("", "", ["part", "forecast", "measured", "measured / forecast"], cells)


def _stages(result: Result) -> Table:
    meter = result.meter
    rows = [["libraries loaded, tiny model trained", "-", format_bytes(meter.start), "-"]]
    rows += [
        [s.name, f"{s.seconds:.1f}", format_bytes(s.after), format_bytes(s.peak)]
        for s in meter.stages
    ]
    rows.append(["all of them", "-", "-", format_bytes(meter.peak())])
    return Table("", "", ["stage", "s", "resident after it", "peak"], rows)


def put(page: Path, heading: str, text: str) -> None:
    """Write a section into the page, in place of one with the same heading."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    parts = re.split(r"^(?=## )", old, flags=re.M)[1:]
    sections = {part.splitlines()[0].removeprefix("## "): part.strip() + "\n" for part in parts}
    sections[heading] = text
    write_text(page, "\n".join([f"{TITLE}\n", f"{ABOUT}\n", *sections.values()]))
