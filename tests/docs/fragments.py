"""What the fragments of code on some pages take for granted: a model, an adapter, an optimizer.

A page that is not listed here starts from nothing, as its reader does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from tests.torch import helpers, models

FRAGMENTS = {
    "docs/distributed.md",
    "docs/ecosystem.md",
    "docs/formats.md",
    "docs/policies.md",
    "docs/quantization.md",
    "docs/recording.md",
}
CONFIG = AllocatorConfig(
    r_init=2, r_target=4, r_max=8, warmup_steps=1, growth_interval=1, growth_end=2
)


def names_for(page: str, folder: Path) -> dict[str, Any]:
    """The names that the code of a page may use before it defines them."""
    if page not in FRAGMENTS:
        return {}
    model = models.build(hidden_size=64, intermediate_size=64)
    names = {
        "AllocatorConfig": AllocatorConfig,
        "AllocatorEngine": AllocatorEngine,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "batches": [helpers.batch(seed) for seed in range(2)],
        "config": CONFIG,
        "drlora_torch": drlora_torch,
        "engine": AllocatorEngine(CONFIG),
        "folder": folder,
        "model": model,
        "name": str(folder / "base"),
        "os": os,
        "path": str(folder / "adapter"),
        "torch": torch,
    }
    if page in ("docs/distributed.md", "docs/formats.md", "docs/ecosystem.md"):
        adapter = drlora_torch.attach(model, AllocatorEngine(CONFIG))
        names |= {"adapter": adapter, "optimizer": helpers.adamw(adapter)}
    if page == "docs/distributed.md":
        names["model"].save_pretrained(names["name"])
        names["adapter"].save_pretrained(names["path"])
    return names
