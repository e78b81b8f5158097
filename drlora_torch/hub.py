"""What an adapter writes and reads: its own directory, the Hugging Face hub, PEFT's directories."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from drlora_torch.errors import CheckpointError
from drlora_torch.files import FILE_NAME

if TYPE_CHECKING:
    from drlora_torch.adapter import Adapter
    from drlora_torch.export.peft_directory import ExportReport

CARD_FILE = "README.md"


class AdapterFiles:
    """The part of :class:`drlora_torch.Adapter` that deals with files."""

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write the adapter and the engine's state to a directory, atomically.

        Load it with :func:`drlora_torch.load`. A file that is already there is replaced only when
        the new one is complete. Between micro-batches of an accumulation, what the step has
        gathered is saved too.

        Args:
            path: the directory.
            push_to_hub: upload the adapter with a model card too; it is written to ``path``,
                unless it has one.
            repo_id: repository on the hub; default: the name of the directory.
            private: visibility of a repository that is made; default: the account's.

        Raises:
            CheckpointError: nothing could be written (no space, no permission) or uploaded.
        """
        from drlora_torch.checkpoint import save

        adapter = self._attached()
        save(adapter, path)
        if push_to_hub:
            write_card(adapter, Path(path))
            upload(Path(path), repo_id or Path(path).resolve().name, private)

    def export_peft(
        self,
        path: str | os.PathLike[str],
        *,
        rank: int | None = None,
        per_expert: bool = False,
    ) -> ExportReport:
        """Write a standard PEFT LoRA directory, which ``PeftModel.from_pretrained`` loads.

        Args:
            path: the directory.
            rank: compress every expert to this rank, by its singular values; default: keep all.
                Where PEFT has one rank for all experts of a layer, smaller ones are padded with
                zeros.
            per_expert: one LoRA per expert and projection (``experts.0.gate_proj.lora_A.weight``),
                as engines read them that go by the names of checkpoints; default: as PEFT itself
                adapts such a model.

        Returns:
            The ranks written, and the relative error of every expert.

        Raises:
            CheckpointError: nothing could be written, or PEFT cannot adapt these experts (DBRX).
            ModelError: experts that ``register_moe`` was told of have no name in their block.
        """
        from drlora_torch.export.peft_directory import export

        return export(self._attached(), path, rank, per_expert)

    def import_peft(self, path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
        """Start from a PEFT adapter of the experts, in any layout that :meth:`export_peft` writes.

        Where its rank is above ``r_init``, the best approximation of that rank is taken.

        Returns:
            Relative Frobenius error of B A by layer, projection and expert; 0 where nothing was
            lost.

        Raises:
            CheckpointError: the directory is damaged or does not fit; nothing was changed.
            AttachError: the adapter has made a step already.
        """
        from drlora_torch.export.importing import start_from

        return start_from(self._attached(), path)

    def _attached(self) -> Adapter:
        adapter = cast("Adapter", self)
        adapter.check_attached()
        return adapter


def find(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Resolve a directory, a file, or the id of a repository on the hub to a local path.

    Raises:
        CheckpointError: it is neither, or the hub cannot be reached and has not been before.
    """
    local = Path(path)
    if local.exists() or not _is_repo_id(str(path)):
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


def _is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def upload(folder: Path, repo_id: str, private: bool | None) -> None:
    """Upload the adapter and its card, making the repository if need be.

    Raises:
        CheckpointError: the hub refused or cannot be reached; the local files are complete.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
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


def write_card(adapter: Adapter, folder: Path) -> None:
    """Write a model card beside the adapter, unless there is one."""
    if not (folder / CARD_FILE).exists():
        (folder / CARD_FILE).write_text(card(adapter, folder.resolve().name), encoding="utf-8")


def card(adapter: Adapter, title: str) -> str:
    """Model card in Markdown: how to load it, its ranks, and how they were allocated."""
    base = _base_name(adapter)
    header = ["---", "library_name: drlora", "tags:", "- lora", "- mixture-of-experts"]
    header += [f"base_model: {base}"] if base else []
    ranks = adapter.ranks()
    rows = [
        f"| `{name}` | {r.size} | {r.sum()} | {r.min()} | {np.median(r):g} | {r.max()} | "
        f"{' '.join(str(each) for each in r)} |"
        for name, r in ranks.items()
    ]
    config = adapter.engine.config.model_dump(mode="json")
    options = adapter.options.model_dump(mode="json", exclude={"layers"})
    lines = [
        *header,
        "---",
        "",
        f"# {title}",
        "",
        "LoRA with a rank of its own for every expert, allocated in training by",
        "[DR-LoRA](https://arxiv.org/abs/2601.04823).",
        "",
        "```python",
        "import drlora_torch",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base or "the base model"}")',
        'adapter = drlora_torch.load(model, "this repository", trainable=False)',
        "```",
        "",
        f"## Ranks after {adapter.engine.step_count} optimizer steps",
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


def _base_name(adapter: Adapter) -> str | None:
    """Id of the base model; a local path says nothing to others."""
    config: Any = getattr(adapter.model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    return name if name and not Path(name).exists() and _is_repo_id(name) else None
