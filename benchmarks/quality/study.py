"""What a study is: a declarative file, and the runs that it names.

A study compares methods on the same model and task, with the same steps, optimizer, batches and
final total rank. Learning rates are swept on a few seeds; the rate with the best validation loss
of its method then trains the other seeds, and the test split is read only for the report.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tomllib
from pydantic import BaseModel, ConfigDict, Field, field_validator


class Frozen(BaseModel):
    """Validated once, never changed, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(Frozen):
    """A way to adapt the experts, in terms of the public options of drlora (or PEFT's)."""

    name: str
    kind: str = "drlora"
    """``drlora``; ``static_profile``: ranks from one pass of routing statistics before training;
    ``peft_lora`` and ``peft_adalora``: PEFT's own."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of AllocatorConfig that differ from the study's."""
    attach: dict[str, Any] = Field(default_factory=dict)
    """Options of ``drlora_torch.attach`` that differ from the defaults."""
    policy: str | None = None
    """Name of a policy of ``policies.py`` that drlora does not have built in."""
    upper_bound: bool = False
    """True for a method that is given more rank than the budget (r_max everywhere)."""


class Training(Frozen):
    """What all methods of a study have in common."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulation: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=256, ge=8)
    """Rows are cut to this many tokens."""
    schedule: str = "linear"
    """Of the learning rate: ``constant``, or ``linear`` to 0 after 5 % of warmup."""
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
    events: int = 8
    max_growth: int | None = None
    dtype: str = "float32"
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
        from benchmarks.quality.methods import METHODS

        return [METHODS[m] if isinstance(m, str) and m in METHODS else m for m in methods]


def load(path: Path) -> Study:
    """Read a study from its file."""
    return Study.model_validate(tomllib.loads(path.read_text()))
