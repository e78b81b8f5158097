"""Validation errors of pydantic in our own words: the value, what is accepted, near misses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from drlora_core.errors import near_misses, shorten

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
Model = TypeVar("Model", bound=BaseModel)


def reword_errors(cls: type[Model], data: Any, handler: ModelWrapValidatorHandler[Model]) -> Model:
    """Validate; reword what pydantic says about fields. A wrapping model validator.

    The error remains a ``pydantic.ValidationError`` with the places and types that pydantic found.
    A model declares it after its other model validators, so that it sees their errors too::

        _reword_errors = model_validator(mode="wrap")(reword_errors)
    """
    try:
        return handler(data)
    except ValidationError as error:
        details = [_reword(cls, each) for each in error.errors()]
        raise ValidationError.from_exception_data(error.title, details) from None


def _reword(cls: type[BaseModel], error: ErrorDetails) -> InitErrorDetails:
    # No context: a text with braces would be taken for a template.
    reworded = PydanticCustomError(error["type"], _text(cls, error))
    return InitErrorDetails(type=reworded, loc=error["loc"], input=error["input"])


def _text(cls: type[BaseModel], error: ErrorDetails) -> str:
    kind, place, value = error["type"], error["loc"], error["input"]
    if kind == "extra_forbidden":
        name = str(place[-1])
        return f"no field {name!r}; {near_misses(name, cls.model_fields)}"
    if kind in OUT_OF_RANGE:
        return f"must be {_range(cls, error)}, got {shorten(value)}"
    if kind == "too_short":
        least = error["ctx"]["min_length"]
        return f"must name at least {'one' if least == 1 else least}, got {shorten(value)}"
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if kind in ("literal_error", "enum"):
        hint = near_misses(str(value), re.findall(r"'([^']+)'", error["ctx"]["expected"]))
        return f"{text}, got {shorten(value)}" + (f"; {hint}" if hint.endswith("?") else "")
    if text.startswith("must be") and f"got {shorten(value)}" not in text:
        text += f", got {shorten(value)}"
    return text


def _range(cls: type[BaseModel], error: ErrorDetails) -> str:
    """Describe the range of a field, or else the bound that was violated."""
    limits = cls.model_fields[str(error["loc"][0])].metadata
    bounds = {b: getattr(limit, b) for limit in limits for b in BOUNDS if hasattr(limit, b)}
    found: Mapping[str, Any] = bounds or error["ctx"]
    return " and ".join(f"{BOUNDS[bound]} {number}" for bound, number in found.items())
