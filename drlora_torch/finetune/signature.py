"""Command-line parameters made from the fields of :class:`FinetuneOptions` and `Sharding`."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from drlora_torch.finetune.options import FinetuneOptions, embedded_defaults
from drlora_torch.finetune.sharding import Sharding

ARGUMENTS = ("model", "data")  # positional on the command line; every other field is an option
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def add_finetune_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the ``**options`` of a typer command, its last parameter, by one per field.

    A parameter that the user does not give is None, so that defaults are declared only once.
    """
    *parameters, _ = signature(command, eval_str=True).parameters.values()
    for name, field in {**FinetuneOptions.model_fields, **Sharding.model_fields}.items():
        given: Any = typer.Option(f"--{name.replace('_', '-')}", help=help_text(name, field))
        if name in ARGUMENTS:
            given = typer.Argument(help=help_text(name, field))
        kind: Any = Annotated[field.annotation | None, given]  # type: ignore[operator]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


def help_text(name: str, field: FieldInfo) -> str:
    """Return the description of a field with its default and range.

    Example:
        >>> help_text("steps", FinetuneOptions.model_fields["steps"])
        'Optimizer steps. [default: 200; at least 1]'
    """
    text, notes = " ".join(str(field.description).split()), []
    if field.default is not None and not field.is_required() and field.annotation is not bool:
        shipped = embedded_defaults().get(name)
        notes = [f"default: {field.default}" + (f", shipped model: {shipped}" if shipped else "")]
    limits = [
        f"{words} {value:g}"
        for bound, words in BOUNDS.items()
        for constraint in field.metadata
        if (value := getattr(constraint, bound, None)) is not None
    ]
    notes += [" and ".join(limits)] if limits else []
    return f"{text} [{'; '.join(notes)}]" if notes else text
