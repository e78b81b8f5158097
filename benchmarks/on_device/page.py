"""The page of results."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import torch

from benchmarks import report
from drlora_core.atomic import write_text

ABOUT = (
    "Four blocks of each model, random frozen weights, rank 16, r_max 64. Frozen: forward, and "
    "backward to the inputs, with the grouped experts of Transformers. The other methods include "
    "AdamW (fused); drlora includes statistics, and growing ranks are as after six events. Times: "
    "ratios, median (quartiles) over interleaved rounds. Host: until one step has been handed to "
    "an idle device, longer than for one of several in a row. Memory: peak of a step above what is "
    "held before it; state: LoRA, gradients and AdamW."
)


def card(device: torch.device) -> str:
    """Name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else report.processor()


def write(
    device: torch.device, tables: list[report.Table], folder: Path, seconds: float, tiny: bool
) -> Path:
    """Write the tables to ``gpu_<card>_<date>.md``."""
    date = datetime.date.today().isoformat()
    first = "" if device.type == "cuda" else "No GPU has run this page. "
    lines = [f"# Training steps on {card(device)}", "", first + ABOUT, ""]
    versions = report.versions("numpy", "torch", "triton", "transformers", "peft", "bitsandbytes")
    lines += [f"{card(device)}; {versions}; {date}; {seconds:.0f} s{', tiny' if tiny else ''}.", ""]
    lines += [line for table in tables for line in table.lines()]
    text = "\n".join(lines[:-1]) + "\n"
    name = re.sub(r"[^a-z0-9]+", "-", card(device).lower()).strip("-")
    path = folder / f"gpu_{name}_{date}{'_tiny' if tiny else ''}.md"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path
