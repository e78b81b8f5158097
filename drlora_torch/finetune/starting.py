"""The adapter that a run begins with: a new one, or one that was trained before."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.adapter import Adapter
from drlora_torch.api import attach, load
from drlora_torch.errors import RunError
from drlora_torch.finetune.groups import RankGroup, RestGroup
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.hub import find
from drlora_torch.storage.peft.files import CONFIG_FILE

ATTACH_OPTIONS = {
    "alpha", "dropout", "layout", "router", "modules_to_save",
    "attention_rank", "attention_alpha", "attention_targets",
}  # fmt: skip
"""Options that :func:`drlora_torch.attach` takes under the same name."""


def start(model: nn.Module, options: FinetuneOptions) -> Adapter:
    """Attach the adapter of a run to its model.

    Raises:
        RunError: the adapter to start from was made with other options than those given.
        DRLoRAError: the model or the adapter does not fit.
    """
    source = None if options.adapter is None else find(Path(options.adapter).expanduser())
    if source is not None and (source.is_file() or (source / FILE_NAME).is_file()):
        adapter = load(model, source)
        try:
            _check_options(options, adapter)
        except RunError:
            adapter.detach()
            raise
        return adapter
    engine = AllocatorEngine(options.allocator_config())
    given = options.model_dump(include=ATTACH_OPTIONS, exclude_none=True)
    adapter = attach(model, engine, **given)
    if source is None:
        return adapter
    try:
        if not (source / CONFIG_FILE).is_file():
            raise RunError(
                f"--adapter {options.adapter}: no adapter of drlora ({FILE_NAME}) nor of PEFT "
                f"({CONFIG_FILE}) is there"
            )
        adapter.import_peft(source)
    except ValueError:
        adapter.detach()
        raise
    return adapter


def _check_options(options: FinetuneOptions, adapter: Adapter) -> None:
    """Refuse options that differ from those with which the adapter to start from was made."""
    own = {**adapter.options.model_dump(mode="json"), **adapter.engine.config.model_dump()}
    for group in (RankGroup, RestGroup):
        for name, field in group.model_fields.items():
            given = getattr(options, name)
            if given == field.default or name not in own:
                continue
            had = tuple(own[name]) if isinstance(own[name], list) else own[name]
            if given != had:
                word = name.replace("_", "-")
                raise RunError(
                    f"--{word} {given}: the adapter to start from has {had}, and keeps it; leave "
                    f"--{word} out"
                )


def config_of(options: FinetuneOptions, adapter: Adapter | None) -> AllocatorConfig:
    """Return the configuration of the allocator of a run."""
    return options.allocator_config() if adapter is None else adapter.engine.config
