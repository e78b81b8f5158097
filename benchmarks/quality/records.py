"""The records of a study: a method, the training settings, and a run before and after training."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PER_METHOD = {"betas", "schedule", "warmup", "growth_end", "events", "max_growth"}
"""Training fields that one method of a study may change; steps, data and budget stay the same."""


class Frozen(BaseModel):
    """Validated once, immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(Frozen):
    """A way to adapt the experts, in terms of the public options of drlora (or PEFT)."""

    name: str
    kind: str = "drlora"
    """One of:

    - ``drlora``.
    - ``static_profile``, ``static_gradient``: fixed ranks, chosen before training from the routing
      or the gradients of one pass over the data.
    - ``from_profile``: fixed ranks, chosen by a starting policy from the routing before training.
    - ``hindsight``: fixed ranks, equal to the final ranks of ``early`` in another run.
    - ``probed``: grows from rank 0, with gradients of one pass as importance at rank 0.
    - ``known_ranks``: grows to the final ranks of ``early`` in another run, in random order.
    - ``peft_lora``, ``peft_adalora``: PEFT's methods.

    An intervention may follow, as in ``drlora + newborn warmup``; see ``interventions.py``.
    """
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of AllocatorConfig that differ from those of the study."""
    attach: dict[str, Any] = Field(default_factory=dict)
    """Options of ``drlora_torch.attach`` that differ from the defaults."""
    policy: str | None = None
    """A policy of ``policies.py``; None: a built-in policy of drlora, named in ``config``."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of Training that differ from those of the study; only those in ``PER_METHOD``."""
    upper_bound: bool = False
    """True for a method that exceeds the budget: every expert has r_max."""

    @property
    def base_kind(self) -> str:
        """The kind without its intervention."""
        return self.kind.partition(" + ")[0]

    @property
    def intervention(self) -> str | None:
        """What the method does around every optimizer step."""
        return self.kind.partition(" + ")[2] or None

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
    """Forward passes per optimizer step."""
    max_tokens: int = Field(default=256, ge=8)
    """Rows are truncated to this many tokens."""
    schedule: Literal["constant", "linear", "slow"] = "linear"
    """Of the learning rate. ``linear``: 5 % warmup, then linear decay to 0; ``slow``: the same
    with 25 % warmup."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Maximum gradient norm."""
    alpha_per_rank: float = 2.0
    """alpha / r_target."""
    r_init: int = 1
    r_target: int = 2
    r_max: int = 8
    warmup: float = 0.1
    """Growth starts after this share of the steps."""
    growth_end: float = 0.6
    """Growth ends after this share of the steps."""
    events: int = Field(default=8, ge=1)
    """Number of growth events, evenly spaced between the two."""
    max_growth: int | None = None
    """Maximum growth per expert and event; None: an expert that gets rank at every event reaches
    r_max at the last one."""
    evaluations: int = Field(default=4, ge=1)
    """Points on the validation curve; the last is at the end of training."""
    evaluation_rows: int = Field(default=256, ge=1)
    """Validation and test splits are cut to their first rows."""
    evaluation_batch: int = Field(default=64, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the base model; LoRA weights are float32."""
    device: str = "cpu"


class RunSpec(Frozen):
    """One training run; equal specifications give equal results."""

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
    """Nats per completion token of the test split."""
    test_exact_match: float
    """Share of test rows in which every completion token is the most likely one."""
    start_loss: float
    """Test loss of the base model."""
    curve: list[tuple[int, float]]
    """(step, validation loss)."""
    total_rank: int
    """Sum of the final ranks."""
    budget: int
    """Number of experts x r_target."""
    trained_parameters: int
    ranks: dict[str, list[int]]
    """Final rank of each expert, by layer."""
    routing: dict[str, list[float]]
    """Final routing frequency f of each expert, by layer; empty if the method has none."""
    importance: dict[str, list[float]]
    """Final rank importance g of each expert, by layer; empty if the method has none."""
    effective_ranks: dict[str, list[float]] = Field(default_factory=dict)
    """Final effective rank of each expert, by layer; empty in early runs and for PEFT's methods."""
    seconds: float
    """Wall time of training and evaluation; the machine may have been shared."""
    versions: dict[str, str]
    diverged: bool = False
    refused: str | None = None
    """Why the method cannot adapt this model; the other figures are then 0."""
