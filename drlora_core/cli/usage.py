"""Mistakes on the command line in one sentence, with the option or command that was meant."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from drlora_core.errors import near_misses

OTHERS = ("finetune", "inspect", "generate", "evaluate", "merge", "export", "push")
"""Commands of drlora_torch, which may not be there."""
LIMITS = {"greater than or equal to": "at least", "less than or equal to": "at most"}
# What other tools call an option; only those that the command has are suggested.
HABITS = {
    "accumulation": ("gradient-accumulation-steps", "gradient-accumulation", "grad-accum"),
    "allocator": ("config", "allocator-config", "config-file"),
    "alpha": ("lora-alpha",),
    "batch-size": ("bs", "b", "per-device-train-batch-size", "train-batch-size"),
    "checkpointing": ("gradient-checkpointing",),
    "data": ("dataset", "dataset-name", "train-file", "train-data"),
    "dropout": ("lora-dropout",),
    "dtype": ("bf16", "fp16", "torch-dtype", "precision"),
    "epochs": ("num-epochs", "num-train-epochs", "n-epochs", "e"),
    "eval-data": ("validation-file", "eval-file", "eval-dataset"),
    "eval-every": ("eval-steps",),
    "gradient-checkpointing": ("checkpointing", "grad-checkpointing"),
    "learning-rate": ("lr",),
    "load-in-4bit": ("4bit", "qlora", "use-4bit"),
    "max-length": ("max-seq-length", "max-seq-len", "seq-len", "cutoff-len", "model-max-length"),
    "model": ("model-name-or-path", "model-name", "base-model", "model-id", "m"),
    "output": ("output-dir", "out-dir", "out", "save-dir", "o"),
    "processes": ("num-processes", "nproc-per-node", "workers", "n-jobs", "j"),
    "r-target": ("rank", "r", "lora-r", "lora-rank"),
    "rank": ("r", "lora-r", "lora-rank", "r-target"),
    "recording": ("trace", "run", "run-dir"),
    "optimizer": ("optim",),
    "lr-scheduler": ("lr-scheduler-type", "scheduler"),
    "max-grad-norm": ("gradient-clipping", "clip", "grad-clip", "max-norm"),
    "patience": ("early-stopping", "early-stopping-patience"),
    "attention-targets": ("target-modules", "lora-target-modules", "lora-target"),
    "resume": ("resume-from-checkpoint",),
    "save-every": ("save-steps",),
    "steps": ("max-steps", "num-steps", "train-steps"),
    "warmup": ("warmup-ratio", "lr-warmup", "lr-warmup-steps"),
}


def describe_usage_error(error: Any, arguments: Sequence[str], missing: Sequence[str] = ()) -> str:
    """Describe a usage error of click in one sentence, and say where the help is.

    Args:
        error: a ``UsageError``, of click or of the copy that typer has.
        arguments: the words of the command line.
        missing: why commands of other packages are not available.
    """
    context = error.ctx
    if context is None:  # of an option without its value
        command = next((word for word in arguments if not word.startswith("-")), "")
        return f"{_sentence(error.format_message())}; see {f'drlora {command}'.strip()} --help"
    if type(error).__name__ == "NoSuchOption":
        text = _no_such_option(error.option_name, context.command, arguments)
    elif hasattr(context.command, "commands") and "o such command" in str(error.message):
        word = next((a for a in arguments if not a.startswith("-")), "")
        text = _no_such_command(word, list(context.command.commands), missing)
    else:
        text = _wrong_value(error, arguments)
    return f"{text}{' See' if text.endswith('?') else '; see'} {context.command_path} --help"


def _sentence(text: str) -> str:
    """Bring a message of click into our form."""
    text = re.sub(r"^Invalid value for '([^']*)': ", r"\1: ", " ".join(text.split()))
    return text[:1].lower() + text[1:].rstrip(".")


def _wrong_value(error: Any, arguments: Sequence[str]) -> str:
    """Say which value is wrong, what is accepted, and what is close to it."""
    text = _sentence(error.format_message()).replace(": Value error, ", ": ", 1)
    if found := re.search(r": '(.*?)' is not one of (.*)", text):
        hint = near_misses(found[1], re.findall(r"'([^']*)'", found[2]))
        return f"{text}; {hint}" if hint.endswith("?") else text
    if ": Input should be " not in text:
        return text
    for words, ours in LIMITS.items():
        text = text.replace(words, ours)
    names, given = getattr(error.param, "opts", ()), ""
    for word, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name in names:
            given = f", got {value if equals else following}"
    return text.replace("Input should be", "must be", 1) + given


def _no_such_command(word: str, known: Iterable[str], missing: Sequence[str]) -> str:
    text, names = f"no such command {word}", list(known)
    others = [name for name in OTHERS if missing and name not in names]
    close = difflib.get_close_matches(word, [*names, *others], n=1)
    if close and close[0] != word:
        text += f"; did you mean {close[0]}?"
    if close and close[0] in names:
        return text
    reasons = "; ".join(f"not available here: {reason}" for reason in missing)
    if text.endswith("?") and reasons:
        return f"{text} {reasons[0].upper()}{reasons[1:]}"
    return f"{text}; {reasons}" if reasons else text


def _no_such_option(option: str, command: Any, arguments: Sequence[str]) -> str:
    if re.fullmatch(r"-\w", option):  # click reads -lr as -l -r
        option = next((a for a in arguments if a.startswith(option)), option)
    option = option.partition("=")[0]
    text = f"no such option {option}"
    word = option.lstrip("-").lower().replace("_", "-")
    options = {
        name.lstrip("-"): name
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("-") and name not in ("-h", "--help")
    }
    places = {p.name.replace("_", "-"): p for p in command.params if not p.opts[0].startswith("-")}
    for found in meanings(word, [*options, *places]):
        if found in places:
            metavar = (places[found].metavar or found).upper().strip("[]")
            return f"{text}; {metavar} is given without the name of an option"
        return f"{text}; did you mean {options[found]}?"
    return text


def meanings(word: str, known: Sequence[str]) -> list[str]:
    """Return the known names that a word may mean, the most likely first.

    Example:
        >>> meanings("lr", ["learning-rate", "layout"]), meanings("step", ["seed", "steps"])
        (['learning-rate'], ['steps'])
    """
    exact = [name for name in known if name == word]
    habits = [name for name, words in HABITS.items() if word in words and name in known]
    return [*exact, *habits, *difflib.get_close_matches(word, known, n=1, cutoff=0.7)]
