"""Command-line parameters made from the fields of :class:`~.recipe.Recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from drlora_torch.finetune.groups import Group
from drlora_torch.finetune.recipe import Recipe, shipped_run
from drlora_torch.finetune.words import format_word

ARGUMENTS = ("model", "data")  # positional on the command line; every other field is an option
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def add_finetune_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the ``**options`` of a typer command, its last parameter, by one per field.

    A parameter that the user does not give is None, so that defaults are declared only once.
    """
    *parameters, _ = signature(command, eval_str=True).parameters.values()
    for name, field in Recipe.model_fields.items():
        text = help_text(name, field)
        given: Any = typer.Option(option_of(name, field), help=text, rich_help_panel=panel_of(name))
        if name in ARGUMENTS:
            given = typer.Argument(help=text)
        kind: Any = Annotated[_word_type(field), given]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


def option_of(name: str, field: FieldInfo) -> str:
    """Return the declaration of an option; a flag can be switched off too, against a recipe."""
    word = f"--{name.replace('_', '-')}"
    return f"{word}/--no-{word[2:]}" if field.annotation is bool else word


def command_line(recipe_fields: Mapping[str, Any]) -> list[str]:
    """Return fields of a recipe as the words of a command line."""
    words = []
    for name, value in recipe_fields.items():
        if name in ARGUMENTS or value is None:
            continue
        word = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(word if value else f"--no-{word[2:]}")
        else:
            words.append(f"{word}={format_word(value)}")
    positional = [str(recipe_fields[name]) for name in ARGUMENTS if name in recipe_fields]
    return [*words, *(["--", *positional] if positional else [])]


def panel_of(name: str) -> str:
    """Return the panel of the group that declares a field."""
    for group in reversed(Recipe.__mro__):
        if issubclass(group, Group) and name in group.model_fields:
            return group.panel
    raise AssertionError(name)


def help_text(name: str, field: FieldInfo) -> str:
    """Return the description of a field with its default and range.

    Example:
        >>> help_text("batch_size", Recipe.model_fields["batch_size"])
        'Rows per device and forward pass. [default: 16; at least 1]'
    """
    text, notes = " ".join(str(field.description).split()), []
    if field.default is not None and not field.is_required() and field.annotation is not bool:
        shipped = shipped_run().get(name)
        notes = [f"default: {field.default}" + (f", shipped model: {shipped}" if shipped else "")]
    limits = [
        f"{words} {value:,}".removesuffix(".0")
        for bound, words in BOUNDS.items()
        for constraint in field.metadata
        if (value := getattr(constraint, bound, None)) is not None
    ]
    notes += [" and ".join(limits)] if limits else []
    return f"{text} [{'; '.join(notes)}]" if notes else text


def _word_type(field: FieldInfo) -> Any:
    """The type of a parameter: that of the field, or text for what :mod:`.words` parses."""
    if any(hasattr(part, "__metadata__") for part in get_args(field.annotation)):
        return str | None
    return field.annotation | None  # type: ignore[operator]
