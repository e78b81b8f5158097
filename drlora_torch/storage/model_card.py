"""The model card of an adapter: how to load it, its ranks, and how they were allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from drlora_torch.attached import Attached
from drlora_torch.storage.hub import is_repo_id


def model_card(attached: Attached, repo: str) -> str:
    """Model card in Markdown for an adapter in a repository."""
    base = _base_name(attached.model)
    header = ["---", "library_name: drlora", "tags:", "- lora", "- mixture-of-experts"]
    header += [f"base_model: {base}"] if base else []
    ranks = {name: layer.lora.table.ranks() for name, layer in attached.layers.items()}
    rows = [
        f"| `{name}` | {r.size} | {r.sum()} | {r.min()} | {np.median(r):g} | {r.max()} | "
        f"{' '.join(str(each) for each in r)} |"
        for name, r in ranks.items()
    ]
    config = attached.engine.config.model_dump(mode="json")
    options = attached.options.model_dump(mode="json", exclude={"layers"})
    lines = [
        *header,
        "---",
        "",
        f"# {repo.rpartition('/')[2]}",
        "",
        "LoRA with a rank of its own for every expert, allocated in training by",
        "[DR-LoRA](https://arxiv.org/abs/2601.04823).",
        "",
        "```python",
        "import drlora_torch",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base or "the base model"}")',
        f'adapter = drlora_torch.load(model, "{repo}", trainable=False)',
        "```",
        "",
        f"## Ranks after {attached.engine.step_count} optimizer steps",
        "",
        "| layer | experts | total | least | median | most | rank of each expert |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "## Configuration",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| `{field}` | {value} |" for field, value in {**config, **options}.items()),
        "",
    ]
    return "\n".join(lines)


def _base_name(model: nn.Module) -> str | None:
    """Id of the base model; a local path says nothing to others."""
    config: Any = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    return name if name and not Path(name).exists() and is_repo_id(name) else None
