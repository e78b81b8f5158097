"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from drlora_core import atomic
from drlora_torch.errors import CheckpointError
from drlora_torch.storage.adapter_file import FILE_NAME

CARD_FILE = "README.md"


def find(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Resolve a directory, a file, or the id of a repository on the hub to a local path.

    Raises:
        CheckpointError: it is neither, or the hub cannot be reached and has not been before.
    """
    local = Path(path)
    if local.exists() or not is_repo_id(str(path)):
        return local
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(str(path), FILE_NAME, revision=revision))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"no adapter at {path}: there is no such directory, the hub cannot be reached (or is "
            "switched off by HF_HUB_OFFLINE), and the adapter is not in the local cache"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"the repository {path!r} on the hub holds no {FILE_NAME}: it is no drlora adapter"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no adapter at {path}: there is no such directory, and no such repository on the hub "
            "that this account may read"
        ) from error
    except Exception as error:  # timeouts, proxies and refused logins raise kinds of their own
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path!r} could not be fetched from the hub: {reason}") from error


def is_repo_id(name: str) -> bool:
    """True for what can be the id of a repository, ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def upload(
    folder: Path, repo_id: str, private: bool | None, write_card: Callable[[str], str]
) -> None:
    """Upload the adapter of a folder with a model card, making the repository if need be.

    Args:
        folder: where the adapter is; the card is written there too, unless it has one.
        repo_id: name of the repository, with or without an owner.
        private: visibility of a repository that is made; None for the account's default.
        write_card: gives the text of the card for the full name of the repository.

    Raises:
        CheckpointError: the hub refused or cannot be reached; the local files are complete.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
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
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"the adapter is written to {folder}, but could not be uploaded to {repo_id!r}: "
            f"{reason}"
        ) from error
