"""What a trained model answers to a prompt, and its base model, shown as it is made."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import typer
from transformers import TextStreamer

from drlora_core.errors import printable
from drlora_torch.finetune.after.opened import Opened
from drlora_torch.finetune.after.prompts import Prompter
from drlora_torch.finetune.after.texts import Sampling, generate


class Show(NamedTuple):
    """How answers are printed."""

    heads: bool
    """With lines that say what an answer belongs to."""
    stream: bool
    """While they are made, rather than when they are complete."""


class _SafeStreamer(TextStreamer):
    """Shows what a model writes, which may be anything."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def answer(
    opened: Opened,
    prompter: Prompter,
    sampling: Sampling,
    prompt: str,
    *,
    base: bool = False,
    show: Show | None = None,
) -> dict[str, str]:
    """Return the prompt and its ``text``, and what the model without the adapter writes.

    Args:
        opened: the run.
        prompter: makes the tokens of the prompt.
        sampling: how to choose the next token.
        prompt: as the user wrote it.
        base: write the text of the base model too, as ``base``.
        show: print them on the way.
    """
    made = {"prompt": prompt}
    tokens, stop = prompter.encode(prompt), prompter.stop_tokens(opened.model)
    if show and show.heads:
        typer.echo(f"> {prompt}")
    for name in ("base", "text") if base else ("text",):
        streamer = None
        if show and base:
            typer.echo("[base model]" if name == "base" else "[trained model]")
        if show and show.stream:
            streamer = _SafeStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with opened.adapter.disabled() if name == "base" else contextlib.nullcontext():
            (made[name],) = generate(
                opened.model, opened.tokenizer, [tokens], sampling, stop, streamer
            )
        if show and not show.stream:
            typer.echo(printable(made[name]))
    return made
