"""Tokenizer and data of a run, checked before its model is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from drlora_torch.errors import DataError, ModelError, RunError
from drlora_torch.finetune.data.prepare import Prepared, prepare
from drlora_torch.finetune.data.splits import read
from drlora_torch.finetune.model import load_config, load_tokenizer
from drlora_torch.finetune.options import FinetuneOptions

GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def load_data(
    options: FinetuneOptions, batches: int, console: Console
) -> tuple[FinetuneOptions, Any, Prepared]:
    """Read, check and tokenize the data.

    Args:
        options: those of the run.
        batches: different batches of a step that processes train on.
        console: shows progress.

    Returns:
        The options with numbers for what depends on the data, the tokenizer, and the data.

    Raises:
        DataError: a row that cannot be used, or nothing to learn from.
        ModelError: no configuration or tokenizer, or one that does not fit the other.
        RunError: no chat template where one is needed.
    """
    if options.epochs is None:  # else it is known later
        check_window(options)
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model)
    check_tokenizer(tokenizer, options.model)
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(Path(options.chat_template))
    chat = bool(getattr(tokenizer, "chat_template", None))
    with console.status("reading the data"):
        found = read(options, chat)
    if not chat and found.train.needs_template:
        raise DataError(
            f"the data has messages, but {options.model!r} has no chat template; use prompt and "
            "completion, --chat-template FILE, or an instruction-tuned model"
        )
    data = prepare(found, options, tokenizer, console)
    check_vocabulary(config, tokenizer, data.largest_id, options.model)
    rows = None if data.sequences is None else -(-data.sequences // batches)
    resolved = options.resolved(rows)
    check_window(resolved)
    return resolved, tokenizer, data


def check_window(options: FinetuneOptions) -> None:
    """Refuse an impossible window, and one that ends after the training does.

    Raises:
        RunError: names the last event, the last step and the fix.
        pydantic.ValidationError: as :class:`drlora_core.AllocatorConfig`.
    """
    events = options.allocator_config().growth_steps
    if options.adapter is None and events and events[-1] > options.planned_steps:
        raise RunError(
            f"ranks would grow last after step {events[-1]}, but the training ends after step "
            f"{options.planned_steps}, so the budget would not be met; use a lower --growth-end"
        )


def read_template(file: Path) -> str:
    """Return the chat template in a file.

    Raises:
        RunError: it cannot be read, or is no Jinja template.
    """
    import jinja2

    try:
        text = file.expanduser().read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            GENERATION.sub("", text)  # a tag of Transformers
        )
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"--chat-template {str(file)!r} cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise RunError(
            f"--chat-template {str(file)!r}, line {error.lineno}: not Jinja ({error.message})"
        ) from error
    except RecursionError as error:
        raise RunError(f"--chat-template {str(file)!r} is nested too deeply") from error
    if not text.strip():
        raise RunError(f"--chat-template {str(file)!r} is empty")
    return text


def check_tokenizer(tokenizer: Any, model: str) -> None:
    """Refuse a tokenizer without a vocabulary, or without anything to pad with.

    Transformers makes an empty one for a folder that has none.
    """
    try:
        usable = len(tokenizer) > 0 and bool(tokenizer("a b c 1 2 3")["input_ids"])
    except Exception as error:  # its files may set any attribute to a value of any kind
        raise ModelError(f"the tokenizer of {model!r} makes no tokens: {error}") from error
    if not usable:
        raise ModelError(
            f"{model!r} has no tokenizer, or one with an empty vocabulary; copy the tokenizer's "
            "files (tokenizer.json, tokenizer_config.json) beside the model"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {model!r} has neither a padding nor an end-of-sequence token; set "
            "one in its tokenizer_config.json"
        )


def check_vocabulary(config: Any, tokenizer: Any, largest_id: int, model: str) -> None:
    """Refuse token ids for which the model has no embedding."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    padding = tokenizer.pad_token_id if tokenizer.pad_token is not None else 0
    largest = max(largest_id, padding or 0)
    if size is not None and largest >= size:
        raise ModelError(
            f"the tokenizer of {model!r} makes token id {largest}, but the model has embeddings "
            f"for {size} tokens (0 to {size - 1}); is it the tokenizer of another model?"
        )
