"""The recipe of a run: all of its options, from the command line and a YAML file, and back."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from drlora_core.errors import near_misses
from drlora_core.runs.recipe import check_yaml
from drlora_torch.embedded import MODEL_DIR, TEST_FILE, TRAIN_FILE
from drlora_torch.errors import RunError
from drlora_torch.finetune.groups import Group
from drlora_torch.finetune.options import FinetuneOptions, is_local
from drlora_torch.finetune.sharding import Sharding

PATHS = ("model", "adapter", "data", "eval_data", "chat_template")
LIBRARIES = ("drlora", "torch", "transformers", "trl", "datasets", "peft")


class RunGroup(Group):
    """Where a run goes."""

    panel: ClassVar[str] = "Run"

    output: str | None = None
    """Folder of the run, which must not exist. If not given, runs/finetune-TIME."""
    compare: Literal["uniform"] | None = None
    """Also train static LoRA with the same budget."""
    processes: int | None = Field(None, ge=1)
    """Processes on this machine, one for each GPU. If not given, 1."""


class Recipe(RunGroup, Sharding, FinetuneOptions):
    """Every option of ``drlora finetune``; one field for each, on the command line and in YAML.

    Raises:
        pydantic.ValidationError: as :class:`FinetuneOptions`.

    Example:
        >>> recipe = Recipe(model="m", data="d.jsonl", fsdp_size=2, processes=2)
        >>> recipe.sharding.words
        ['--fsdp-size=2']
    """

    panel: ClassVar[str] = ""

    @model_validator(mode="after")
    def _check_comparison(self) -> Recipe:
        if self.compare and (self.adapter or self.policy == "uniform"):
            what = "an adapter to start from" if self.adapter else "policy uniform"
            raise ValueError(f"compare {self.compare} with {what} would train the same twice")
        return self

    @property
    def options(self) -> FinetuneOptions:
        """What the run trains, on what and how."""
        return FinetuneOptions.model_validate(self._part(FinetuneOptions))

    @property
    def sharding(self) -> Sharding:
        """How the processes hold the model."""
        return Sharding.model_validate(self._part(Sharding))

    @property
    def different_batches(self) -> int:
        """Different batches that the processes of the run train on."""
        return self.sharding.batches(self.processes or 1)

    def _part(self, kind: type[Group]) -> dict[str, Any]:
        return self.model_dump(include=set(kind.model_fields))


def shipped_run() -> dict[str, object]:
    """Return the options of a run without arguments: the shipped model and task."""
    return {
        "model": str(MODEL_DIR),
        "data": str(TRAIN_FILE),
        "eval_data": str(TEST_FILE),
        "learning_rate": 5e-3,
        "max_length": 128,
        "r_target": 4,
        "r_max": 12,
    }


def combine(given: Mapping[str, Any], file: Path | None = None) -> Recipe:
    """Make a recipe of the options given and those of a file; what is given wins.

    Steps that are given take the place of the file's epochs, and epochs that of its steps. Without
    a model, it is the run of the shipped one.

    Args:
        given: fields of :class:`Recipe`.
        file: a YAML file with more of them.

    Raises:
        RunError: the file cannot be read or has other fields, or a model comes without data.
        pydantic.ValidationError: as :class:`Recipe`.
    """
    values = {} if file is None else read_fields(file)
    if given.get("steps") or given.get("epochs"):
        values |= {"steps": None, "epochs": None}  # both say how long the run is
    values |= given
    for name, other in (("model", "data"), ("data", "model")):
        if values.get(name) is not None and values.get(other) is None:
            raise RunError(f"a {name.upper()} needs {other.upper()}: drlora finetune MODEL DATA")
    shipped = {} if values.get("model") is not None else shipped_run()
    return Recipe.model_validate({**shipped, **values})


def read_fields(file: Path) -> dict[str, Any]:
    """Read the fields of a recipe from a YAML file; ``-`` and ``_`` in their names are the same.

    Raises:
        RunError: the file is missing or no YAML mapping, or a field is unknown or there twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(yaml, text)
        content = yaml.load(text, _OneOfEach)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(f"{str(file)!r} cannot be read: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RunError(f"{str(file)!r} must hold options, one NAME: VALUE in a line")
    fields: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in Recipe.model_fields:
            hint = near_misses(name, Recipe.model_fields)
            raise RunError(f"{str(file)!r}: no option {name!r}; {hint}")
        if name in fields:
            raise RunError(f"{str(file)!r}: option {name!r} is there twice")
        if isinstance(value, bool) and Recipe.model_fields[name].annotation is not bool:
            raise RunError(
                f"{str(file)!r}: {name} cannot be {value} (YAML reads yes, no, on and off so)"
            )
        fields[name] = value
    return fields


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that is there twice; YAML's own loader takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # others are refused below
                if key.value in names:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"option {key.value!r} is there twice", node.start_mark
                    )
                names.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths, which mean the same in every working directory."""
    paths = {
        name: str(Path(value).expanduser().resolve())
        for name in PATHS
        if (value := getattr(recipe, name)) is not None and _is_path(name, value)
    }
    return recipe.model_copy(update=paths)


def _is_path(name: str, value: str) -> bool:
    return name == "chat_template" or is_local(value)


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that :func:`read_fields` reads; without its folder."""
    fields = recipe.model_dump(mode="json", exclude={"output"})
    made_by = f"Python {platform.python_version()}"
    for name in LIBRARIES:
        try:
            made_by += f", {name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    head = (
        "# All options of a run. It is repeated by: drlora finetune --config FILE --output FOLDER\n"
        f"# {made_by}\n"
    )
    body: str = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return head + body
