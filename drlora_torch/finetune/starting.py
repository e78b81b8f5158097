"""The adapter that a run begins with: a new one, or one that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.adapter import Adapter
from drlora_torch.api import attach, load
from drlora_torch.embedded import MODEL_DIR
from drlora_torch.errors import RunError
from drlora_torch.finetune.groups import RankGroup, RestGroup
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.recipe import shipped_run
from drlora_torch.storage import checkpoint
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.hub import find
from drlora_torch.storage.peft.files import CONFIG_FILE

ATTACH_OPTIONS = {
    "alpha", "dropout", "layout", "router", "modules_to_save", "importance", "routing",
    "attention_rank", "attention_alpha", "attention_targets",
}  # fmt: skip
"""Options that :func:`drlora_torch.attach` takes under the same name."""


def adopt(options: FinetuneOptions) -> FinetuneOptions:
    """Return the options with those of the adapter of drlora to start from, which it keeps.

    Raises:
        RunError: other ones are given.
        CheckpointError: there is no such adapter, or its file is damaged.
    """
    source = _own_adapter(options)
    if source is None:
        return options
    saved = checkpoint.read(source)
    newer = AllocatorConfig().model_dump(mode="json")  # fields that the file may be too old for
    own = {**newer, **saved.options.model_dump(mode="json"), **saved.state["config"]}
    shipped = shipped_run() if options.model == str(MODEL_DIR) else {}
    kept: dict[str, Any] = {}
    for group in (RankGroup, RestGroup):
        for name, field in group.model_fields.items():
            if name not in own:
                continue
            had = tuple(own[name]) if isinstance(own[name], list) else own[name]
            given, word = getattr(options, name), f"--{name.replace('_', '-')}"
            if given not in (field.default, shipped.get(name), had):
                raise RunError(
                    f"{word} {given}: the adapter to start from has {had}, and keeps it; leave "
                    f"{word} out"
                )
            kept[name] = had
    return options.model_copy(update=kept)


def start(model: nn.Module, options: FinetuneOptions) -> Adapter:
    """Attach the adapter of a run to its model.

    Raises:
        RunError: there is no adapter to start from.
        DRLoRAError: the model or the adapter does not fit.
    """
    own = _own_adapter(options)
    if own is not None:
        return load(model, own)
    engine = AllocatorEngine(options.allocator_config())
    given = options.model_dump(include=ATTACH_OPTIONS, exclude_none=True)
    adapter = attach(model, engine, **given)
    if options.adapter is None:
        return adapter
    try:
        adapter.import_peft(Path(options.adapter).expanduser())
    except ValueError:
        adapter.detach()
        raise
    return adapter


def _own_adapter(options: FinetuneOptions) -> Path | None:
    """Find the adapter of drlora to start from; None for one of PEFT, or without any."""
    if options.adapter is None:
        return None
    source = find(Path(options.adapter).expanduser())
    if source.is_file() or (source / FILE_NAME).is_file():
        return source
    if not (source / CONFIG_FILE).is_file():
        raise RunError(
            f"--adapter {options.adapter}: no adapter of drlora ({FILE_NAME}) nor of PEFT "
            f"({CONFIG_FILE}) is there"
        )
    return None
