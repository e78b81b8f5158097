"""A study: a TOML file that names models, tasks, methods, learning rates and seeds.

A study compares methods on the same model and task, with the same steps, optimizer, batches and
final total rank. Every learning rate runs on a few tuning seeds. The rate with the lowest
validation loss, chosen per method, then runs on the other seeds. Only the report uses the test
split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomllib
from pydantic import ValidationError, field_validator

from benchmarks.quality.errors import StudyError, describe
from benchmarks.quality.methods import find_method
from benchmarks.quality.records import Frozen, Method, Training
from drlora_core.errors import near_misses

PROFILES = Path(__file__).parent / "profiles"


class Study(Frozen):
    """The content of ``profiles/<name>.toml``."""

    name: str
    description: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    """Task names, or paths of .jsonl files."""
    methods: tuple[Method, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    """Every learning rate runs on these seeds."""
    seeds: tuple[int, ...]
    """The best learning rate runs on these seeds; they may include the tuning seeds."""
    training: Training

    @field_validator("methods", mode="before")
    @classmethod
    def _find_methods(cls, methods: Any) -> Any:
        return [find_method(method) if isinstance(method, str) else method for method in methods]

    @field_validator("methods")
    @classmethod
    def _check_names(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        names = [method.name for method in methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two methods are named {name!r}")
        return methods


def find_profile(profile: str) -> Path:
    """Path of a study file, given the name of a profile or a path.

    Raises:
        StudyError: neither exists.
    """
    known = {path.stem: path for path in sorted(PROFILES.glob("*.toml"))}
    if profile in known:
        return known[profile]
    if Path(profile).is_file():
        return Path(profile)
    raise StudyError(f"no profile {profile!r}, and no such file; {near_misses(profile, known)}")


def load(path: Path) -> Study:
    """Read a study.

    Raises:
        StudyError: the file is not valid TOML, or not a valid study.
    """
    try:
        return Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path}: {error}") from None
    except ValidationError as error:
        raise StudyError(f"{path}: {describe(error)}") from None
