"""The model card of an adapter: how to load it, its ranks, and how they were allocated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from drlora_torch.attached import Attached
from drlora_torch.storage.hub import is_repo_id

CARD = """\
---
library_name: drlora
tags:
- lora
- mixture-of-experts
{base_line}---

# {title}

LoRA with a rank of its own for every expert, allocated in training by
[DR-LoRA](https://arxiv.org/abs/2601.04823).

```python
import drlora_torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
adapter = drlora_torch.load(model, "{repo}", trainable=False)
```

## Ranks after {steps} optimizer steps

| layer | experts | total | least | median | most | rank of each expert |
|---|---|---|---|---|---|---|
{ranks}

## Configuration

| field | value |
|---|---|
{fields}
"""


def model_card(attached: Attached, repo: str) -> str:
    """Model card in Markdown for an adapter in a repository."""
    base = str(getattr(getattr(attached.model, "config", None), "_name_or_path", "") or "")
    if Path(base).exists() or not is_repo_id(base):
        base = ""  # a local path says nothing to others
    ranks = {name: layer.lora.table.ranks() for name, layer in attached.layers.items()}
    fields = attached.engine.config.model_dump(mode="json")
    fields |= attached.options.model_dump(mode="json", exclude={"layers"})
    return CARD.format(
        base_line=f"base_model: {base}\n" if base else "",
        title=repo.rpartition("/")[2],
        base=base or "the base model",
        repo=repo,
        steps=attached.engine.step_count,
        ranks="\n".join(
            f"| `{name}` | {r.size} | {r.sum()} | {r.min()} | {np.median(r):g} | {r.max()} | "
            f"{' '.join(map(str, r))} |"
            for name, r in ranks.items()
        ),
        fields="\n".join(f"| `{field}` | {value} |" for field, value in fields.items()),
    )
