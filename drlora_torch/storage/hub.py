"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from drlora_core import atomic
from drlora_torch.errors import CheckpointError
from drlora_torch.storage.adapter_file import FILE_NAME

CARD_FILE = "README.md"
REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
    (
        errors.LocalEntryNotFoundError,
        "the hub cannot be reached (or HF_HUB_OFFLINE is set), and the adapter is not cached",
    ),
    (errors.EntryNotFoundError, f"the repository holds no {FILE_NAME}"),
    (errors.RepositoryNotFoundError, "no such repository on the hub that this account may read"),
)


def find(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Resolve a directory, a file, or the id of a repository on the hub to a local path."""
    local = Path(path)
    if local.exists() or not is_repo_id(str(path)):
        return local
    try:
        return Path(huggingface_hub.hf_hub_download(str(path), FILE_NAME, revision=revision))
    except Exception as error:  # timeouts, proxies and refused logins raise kinds of their own
        reasons = (reason for kind, reason in REASONS if isinstance(error, kind))
        raise CheckpointError(
            f"no adapter at {path}: there is no such directory, and it could not be fetched from "
            f"the hub: {next(reasons, _first_line(error))}"
        ) from error


def is_repo_id(name: str) -> bool:
    """True for what can be the id of a repository, ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def upload(
    folder: Path, repo_id: str, private: bool | None, write_card: Callable[[str], str]
) -> None:
    """Upload the adapter of a folder, creating the repository if it does not exist.

    ``write_card`` gives the text of a model card for the full name of the repository. The card is
    written to the folder and uploaded too; one that is already there stays.
    """
    try:
        api = huggingface_hub.HfApi()
        repo = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if not (folder / CARD_FILE).exists():
            atomic.write_text(folder / CARD_FILE, write_card(repo))
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[FILE_NAME, CARD_FILE],
            commit_message="Upload drlora adapter",
        )
    except Exception as error:  # whatever the hub's client and the network raise
        raise CheckpointError(
            f"the adapter is written to {folder}, but could not be uploaded to {repo_id!r}: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
