"""What a study is: a declarative file, and the runs that it names.

A study compares methods on the same model and task, with the same steps, optimizer, batches and
final total rank. Learning rates are swept on a few seeds; the rate with the best validation loss
of its method then trains the other seeds, and the test split is read only for the report.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import tomllib
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from drlora_core.errors import DRLoRAError, near_misses

PROFILES = Path(__file__).parent / "profiles"
PER_METHOD = {"betas", "warmup", "growth_end", "events", "max_growth"}


class StudyError(DRLoRAError):
    """A study, or a file of one, that cannot be used."""


class Frozen(BaseModel):
    """Validated once, never changed, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(Frozen):
    """A way to adapt the experts, in terms of the public options of drlora (or PEFT's)."""

    name: str
    kind: str = "drlora"
    """``drlora``; ``static_profile`` and ``static_gradient``: ranks given before training, by the
    routing or the gradients of one pass; ``hindsight``: those that early growth ends with, which
    only another training knows; ``peft_lora`` and ``peft_adalora``: PEFT's own."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of AllocatorConfig that differ from the study's."""
    attach: dict[str, Any] = Field(default_factory=dict)
    """Options of ``drlora_torch.attach`` that differ from the defaults."""
    policy: str | None = None
    """Name of a policy of ``policies.py`` that drlora does not have built in."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of Training that differ from the study's, of those in ``PER_METHOD``: what may differ
    while steps, data and budget stay the same."""
    upper_bound: bool = False
    """True for a method that is given more rank than the budget: r_max everywhere."""

    @field_validator("training")
    @classmethod
    def _may_differ(cls, training: dict[str, Any]) -> dict[str, Any]:
        for name in training.keys() - PER_METHOD:
            raise ValueError(
                f"{name!r} must be the same for all methods of a study; one method may change "
                f"{', '.join(sorted(PER_METHOD))}"
            )
        return training


class Training(Frozen):
    """What all methods of a study have in common."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Rows per forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Passes per optimizer step."""
    max_tokens: int = Field(default=256, ge=8)
    """Rows are cut to this many tokens."""
    schedule: Literal["constant", "linear", "slow"] = "linear"
    """Of the learning rate: ``constant``; ``linear`` to 0 after 5 % of warmup; ``slow``: the same
    after 25 %."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    alpha_per_rank: float = 2.0
    """alpha / r_target."""
    r_init: int = 1
    r_target: int = 2
    r_max: int = 8
    warmup: float = 0.1
    """Share of the steps before growth may begin."""
    growth_end: float = 0.6
    """Share of the steps at which growth has ended."""
    events: int = Field(default=8, ge=1)
    """Growth events, evenly between the two."""
    max_growth: int | None = None
    """Most rank per expert and event; None: who wins every event reaches r_max at the last."""
    evaluations: int = Field(default=4, ge=1)
    """Points of the curve of validation loss, the last at the end."""
    evaluation_rows: int = Field(default=256, ge=1)
    """Validation and test splits are cut to their first rows."""
    evaluation_batch: int = Field(default=64, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base model; LoRA has at least float32."""
    device: str = "cpu"


class RunSpec(Frozen):
    """One training run; two runs with the same specification give the same numbers."""

    model: str
    task: str
    method: Method
    learning_rate: float
    seed: int
    training: Training

    @property
    def key(self) -> str:
        """Identifies the run in a results file."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class RunRecord(Frozen):
    """One line of a results file."""

    key: str
    spec: RunSpec
    validation_loss: float
    test_loss: float
    """Mean over the completion tokens of the test split, in nats."""
    test_exact_match: float
    """Share of test rows whose every completion token is the most likely one."""
    start_loss: float
    """Test loss of the base model."""
    curve: list[tuple[int, float]]
    """Validation loss by step, a few points."""
    total_rank: int
    """Sum of the ranks at the end."""
    budget: int
    """What it should be: experts x r_target over all layers."""
    trained_parameters: int
    ranks: dict[str, list[int]]
    """Final rank of each expert by layer."""
    routing: dict[str, list[float]]
    """Routing frequency f of each expert at the end; empty where nothing measured it."""
    importance: dict[str, list[float]]
    """Rank importance g of each expert at the end; empty where nothing measured it."""
    seconds: float
    """Of training and evaluation, on a machine that may have done other things too."""
    versions: dict[str, str]
    diverged: bool = False
    refused: str | None = None
    """Why the method could not run at all; then the figures are NaN-free zeros."""


class Study(Frozen):
    """A declarative file, ``profiles/<name>.toml``."""

    name: str
    description: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    """Names of ``tasks.py``, or paths of .jsonl files."""
    methods: tuple[Method, ...]
    learning_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    """Seeds on which every learning rate runs."""
    seeds: tuple[int, ...]
    """Seeds of the report; the tuning seeds may be among them."""
    training: Training

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, methods: Any) -> Any:
        return [named(method) if isinstance(method, str) else method for method in methods]

    @field_validator("methods")
    @classmethod
    def _differ(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        names = [method.name for method in methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two methods are named {name!r}")
        return methods


def named(name: str) -> Method:
    """A method of the table.

    Raises:
        StudyError: there is none of that name.
    """
    from benchmarks.quality.methods import METHODS

    if name not in METHODS:
        raise StudyError(f"no method {name!r}; {near_misses(name, METHODS)}")
    return METHODS[name]


def find(profile: str) -> Path:
    """The file of a profile: of its name in ``profiles/``, or a path.

    Raises:
        StudyError: there is neither.
    """
    known = {path.stem: path for path in sorted(PROFILES.glob("*.toml"))}
    if profile in known:
        return known[profile]
    if Path(profile).is_file():
        return Path(profile)
    raise StudyError(f"no profile {profile!r}, and no such file; {near_misses(profile, known)}")


def load(path: Path) -> Study:
    """Read a study from its file.

    Raises:
        StudyError: it is no TOML, or not a study.
    """
    try:
        return Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path}: {error}") from None
    except ValidationError as error:
        raise StudyError(f"{path}: {sentence(error)}") from None


def sentence(error: ValidationError) -> str:
    """What is wrong, one clause per mistake."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors()
    )
