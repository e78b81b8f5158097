"""The error of the quality studies, and validation errors in plain words."""

from __future__ import annotations

from pydantic import ValidationError

from drlora_core.errors import DRLoRAError


class StudyError(DRLoRAError):
    """A study, or one of its files, cannot be used."""


def describe(error: ValidationError) -> str:
    """All validation errors in one line, one clause each."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors()
    )
