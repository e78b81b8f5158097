"""Adapters on the Hugging Face hub, with their model card."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
from huggingface_hub import errors

from drlora_core import AllocatorEngine, atomic
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.options import AdapterOptions
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.run_folder import adapter_in

CARD_FILE = "README.md"
MARK = "<!-- Written by drlora for each upload; without this line, the card is yours. -->"
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
    if (in_run := adapter_in(local)) is not None:
        return in_run
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

    A model card is written to the folder and uploaded too; one that the user wrote stays.
    """
    upload_files(
        folder,
        repo_id,
        private,
        card=lambda repo: model_card(attached, repo),
        patterns=[FILE_NAME, CARD_FILE],
    )


def upload_files(
    folder: Path,
    repo_id: str,
    private: bool | None,
    *,
    card: Callable[[str], str],
    patterns: list[str] | None = None,
) -> str:
    """Upload files of a folder, into a new repository if there is none of the name.

    Args:
        folder: that holds them.
        repo_id: of the repository.
        private: visibility of a new one; None: the account's default.
        card: makes the model card for a repository, if the folder has none of the user's own.
        patterns: names of the files; None: all.

    Returns:
        The id of the repository, with its owner.

    Raises:
        CheckpointError: whatever the hub's client and the network object to.
    """
    try:
        api = huggingface_hub.HfApi()
        repo = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if _may_write(folder / CARD_FILE):
            atomic.write_text(folder / CARD_FILE, f"{card(repo).rstrip()}\n\n{MARK}\n")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=patterns,
            commit_message="Upload drlora adapter" if patterns else "Upload model",
        )
    except Exception as error:  # whatever the hub's client and the network raise
        raise CheckpointError(
            f"the files are in {folder}, but could not be uploaded to {repo_id!r}: "
            f"{_first_line(error)}"
        ) from error
    return repo


def _may_write(card: Path) -> bool:
    """True if there is no card, or one of an earlier upload."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace")


def model_card(attached: Attached, repo: str) -> str:
    """How to load the adapter of a repository, its ranks, and how they were allocated."""
    base = str(getattr(getattr(attached.model, "config", None), "_name_or_path", "") or "")
    return adapter_card(base, attached.engine, attached.options, repo)


def adapter_card(base: str, engine: AllocatorEngine, options: AdapterOptions, repo: str) -> str:
    """Write the card of an adapter, from what its file says.

    Args:
        base: id of the base model; a local path is not named.
        engine: that has allocated the ranks.
        options: of the adapter.
        repo: id of the repository that the card is for.
    """
    base = public_name(base)
    ranks = {name: engine.ranks(name) for name in engine.layer_names}
    fields = engine.config.model_dump(mode="json")
    fields |= options.model_dump(mode="json", exclude={"layers"})
    return CARD.format(
        base_line=f"base_model: {base}\n" if base else "",
        title=repo.rpartition("/")[2],
        base=base or "the base model",
        repo=repo,
        steps=engine.step_count,
        ranks="\n".join(
            f"| `{name}` | {r.size} | {r.sum()} | {r.min()} | {np.median(r):g} | {r.max()} | "
            f"{' '.join(map(str, r))} |"
            for name, r in ranks.items()
        ),
        fields="\n".join(f"| `{field}` | {value} |" for field, value in fields.items()),
    )


def public_name(model: str) -> str:
    """Return the id of a model on the hub; nothing for a local path, which others cannot use."""
    return "" if Path(model).exists() or not is_repo_id(model) else model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
