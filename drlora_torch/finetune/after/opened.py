"""Open the folder of a run, to use what it has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from drlora_torch.adapter import Adapter
from drlora_torch.api import load
from drlora_torch.finetune.after.found import adapter_of, read_options
from drlora_torch.finetune.inputs import check_tokenizer, read_template
from drlora_torch.finetune.model import load_base, load_tokenizer
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.storage import adapter_file


class Opened(NamedTuple):
    """What a run has trained, on its base model."""

    options: FinetuneOptions
    tokenizer: Any
    adapter: Adapter

    @property
    def model(self) -> Any:
        """The base model, with the adapter in it."""
        return self.adapter.model


def open_tokenizer(options: FinetuneOptions) -> Any:
    """Load the tokenizer of a run, with its chat template.

    Raises:
        ModelError: there is none.
        RunError: the run had a chat template of its own, which cannot be read any more.
    """
    tokenizer = load_tokenizer(options.model)
    check_tokenizer(tokenizer, options.model)
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(Path(options.chat_template))
    return tokenizer


def open_run(run: Path, *, tokenizer: Any = None, on_gpu: bool = False) -> Opened:
    """Load the base model, the tokenizer and the adapter of a run, or its last checkpoint.

    The adapter is not trainable.

    Args:
        run: the folder that ``drlora finetune`` wrote.
        tokenizer: of the run, if it was opened before.
        on_gpu: move the model to the GPU, if there is one.

    Raises:
        RunError: the folder is not that of a run, or nothing was saved yet.
        ModelError: the base model is missing.
        CheckpointError: the adapter is damaged, or the base model is not the one of the training.
    """
    options, source = read_options(run), adapter_of(run)
    adapter_file.read(source)  # a damaged one is refused before the model is loaded
    if tokenizer is None:
        tokenizer = open_tokenizer(options)
    model = load_base(options)
    if on_gpu and torch.cuda.is_available():
        model.to("cuda")
    return Opened(options, tokenizer, load(model, source, trainable=False))
