"""``drlora generate``: text of a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from drlora_core.cli.common import AsJson, emit
from drlora_torch.errors import RunError

BYTE_ORDER_MARK = "\ufeff"
Run = Annotated[Path, typer.Argument(help="Folder of a run of drlora finetune.")]
Prompts = Annotated[
    list[str], typer.Argument(help="What to go on from; - reads one prompt a line from stdin.")
]
Length = Annotated[int, typer.Option(help="Longest text, in tokens.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")
]
TopP = Annotated[
    float, typer.Option(help="Draw among the likeliest tokens of this probability, above 0 to 1.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of each text that is drawn.")]
Base = Annotated[bool, typer.Option("--base", help="Show the text of the base model too.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain",
        help="Use the chat template, or add nothing to a prompt. If neither is given, as the run "
        "was trained: the template for messages, conversations, questions and instructions, if "
        "there is one; nothing for prompt and completion, and for text.",
    ),
]
System = Annotated[str | None, typer.Option(help="System message, for the chat template.")]


def generate(
    run: Run,
    prompts: Prompts,
    max_new_tokens: Length = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    base: Base = False,
    chat: Chat = None,
    system: System = None,
    as_json: AsJson = False,
) -> None:
    """Write what a trained model says, and its base model with --base.

    The adapter of an unfinished run is that of its last checkpoint. A text ends where the model
    ends it, or after --max-new-tokens.
    """
    from drlora_torch.finetune.after.answers import Show, answer
    from drlora_torch.finetune.after.found import adapter_of, read_options, trained_columns
    from drlora_torch.finetune.after.opened import open_run, open_tokenizer
    from drlora_torch.finetune.after.prompts import Prompter
    from drlora_torch.finetune.after.texts import Sampling
    from drlora_torch.finetune.watch.progress import quiet_libraries

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    options = read_options(run)
    adapter_of(run)
    with quiet_libraries():
        tokenizer = open_tokenizer(options)
        prompter = Prompter(tokenizer, trained_columns(run), chat, system)
        for prompt in set(prompts) - {"-"}:
            prompter.encode(prompt)  # refused before the model is loaded
        with Console(stderr=True).status("loading the model"):
            opened = open_run(run, tokenizer=tokenizer, on_gpu=True)
        heads = base or len(prompts) > 1 or prompts == ["-"]
        show = None if as_json else Show(heads, sys.stdout.isatty())
        answers = [
            answer(opened, prompter, sampling, prompt, base=base, show=show)
            for prompt in _each(prompts)
        ]
    if not answers:
        raise RunError("no prompt: standard input is empty")
    if as_json:
        emit(answers)


def _each(prompts: Iterable[str]) -> Iterator[str]:
    """The prompts, with the lines of standard input in place of ``-``, as they come."""
    for prompt in prompts:
        if prompt != "-":
            yield prompt
            continue
        try:
            for number, line in enumerate(sys.stdin):
                text = line.rstrip("\r\n")
                if text := text if number else text.removeprefix(BYTE_ORDER_MARK):
                    yield text
        except UnicodeDecodeError as error:
            raise RunError(f"standard input is not {error.encoding}: {error.reason}") from error
