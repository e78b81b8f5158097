"""Upload what a run has trained to the Hugging Face hub."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from drlora_torch.errors import RunError
from drlora_torch.finetune import folder
from drlora_torch.finetune.after.found import adapter_of, read_options
from drlora_torch.storage import checkpoint
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.hub import (
    CARD_FILE,
    adapter_card,
    is_repo_id,
    public_name,
    upload_files,
)

MADE_BY = {"peft": (folder.PEFT, "drlora export"), "merged": (folder.MERGED, "drlora merge")}
CARD = """\
---
library_name: {library}
tags:
- mixture-of-experts
- drlora
{base_line}---

# {title}

{what}, fine-tuned with LoRA whose rank each expert was given by
[DR-LoRA](https://arxiv.org/abs/2601.04823).
"""
WHAT = {"peft": "PEFT adapter of {base}", "merged": "{base}"}
LIBRARY = {"peft": "peft", "merged": "transformers"}


def push_run(run: Path, repo_id: str, what: str, *, private: bool | None = None) -> str:
    """Upload a part of a run, and return the id of its repository.

    Args:
        run: folder of the run.
        repo_id: of the repository.
        what: ``adapter``, ``peft`` or ``merged``.
        private: visibility of a new repository; None: the account's default.

    Raises:
        RunError: there is no such run, or not that part of it yet; names the command.
        CheckpointError: the adapter is damaged, or the upload failed.
    """
    base = read_options(run).model
    if not is_repo_id(repo_id):
        raise RunError(f"REPO_ID {repo_id!r} must be OWNER/NAME, such as me/my-adapter")
    if what == "adapter":
        source = adapter_of(run)
        saved = checkpoint.read(source)
        engine = checkpoint.restore_engine(saved)
        return upload_files(
            source,
            repo_id,
            private,
            card=lambda repo: adapter_card(base, engine, saved.options, repo),
            patterns=[FILE_NAME, CARD_FILE],
        )
    name, command = MADE_BY[what]
    if not (run / name).is_dir() or not any((run / name).iterdir()):
        raise RunError(f"{str(run / name)!r} does not exist; make it: {command} {_word(run)}")
    return upload_files(run / name, repo_id, private, card=_card(what, public_name(base)))


def _card(what: str, base: str) -> Callable[[str], str]:
    def write(repo: str) -> str:
        return CARD.format(
            library=LIBRARY[what],
            base_line=f"base_model: {base}\n" if base else "",
            title=repo.rpartition("/")[2],
            what=WHAT[what].format(base=base or "a mixture-of-experts model"),
        )

    return write


def _word(run: Path) -> str:
    return shlex.quote(str(run))
