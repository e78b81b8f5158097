"""Adapters on the Hugging Face hub, with their model card."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
import numpy as np
from huggingface_hub import errors

from drlora_core import atomic
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.storage.adapter_file import FILE_NAME

CARD_FILE = "README.md"
RUN_ADAPTER = "adapter"
"""Where a run of ``drlora finetune`` keeps its adapter, in its folder."""
REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (
        errors.LocalEntryNotFoundError,
        "the hub cannot be reached (or HF_HUB_OFFLINE is set), and the adapter is not cached",
    ),
    (errors.EntryNotFoundError, f"the repository holds no {FILE_NAME}"),
    (errors.RepositoryNotFoundError, "no such repository on the hub that this account may read"),
)


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


def find(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Resolve a directory, a file, or the id of a repository on the hub to a local path.

    The folder of a run stands for the adapter in it.
    """
    local = Path(path)
    if not (local / FILE_NAME).is_file() and (local / RUN_ADAPTER / FILE_NAME).is_file():
        return local / RUN_ADAPTER
    if local.exists() or not is_repo_id(os.fspath(path)):
        return local
    try:
        return Path(huggingface_hub.hf_hub_download(os.fspath(path), FILE_NAME, revision=revision))
    except Exception as error:  # timeouts, proxies and refused logins raise kinds of their own
        reasons = (reason for kind, reason in REASONS if isinstance(error, kind))
        raise CheckpointError(
            f"no adapter at {os.fspath(path)}: there is no such directory, and it could not be "
            f"fetched from the hub: {next(reasons, _first_line(error))}"
        ) from error


def is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def upload(attached: Attached, folder: Path, repo_id: str, private: bool | None) -> None:
    """Upload the adapter saved in a folder, into a new repository if there is none of the name.

    A model card is written to the folder and uploaded too; one that is already there stays.
    """
    try:
        api = huggingface_hub.HfApi()
        repo = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if not (folder / CARD_FILE).exists():
            atomic.write_text(folder / CARD_FILE, model_card(attached, repo))
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[FILE_NAME, CARD_FILE],
            commit_message="Upload drlora adapter",
        )
    except Exception as error:  # whatever the hub's client and the network raise
        raise CheckpointError(
            f"the adapter is in {folder}, but could not be uploaded to {repo_id!r}: "
            f"{_first_line(error)}"
        ) from error


def model_card(attached: Attached, repo: str) -> str:
    """How to load the adapter of a repository, its ranks, and how they were allocated."""
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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
