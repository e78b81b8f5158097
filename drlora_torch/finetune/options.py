"""Options of a fine-tuning run, validated once and saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from drlora_core import AllocatorConfig
from drlora_torch.embedded import MODEL_DIR, TEST_FILE, TRAIN_FILE


class FinetuneOptions(BaseModel):
    """What ``drlora finetune`` does; the command line has one option per field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    eval_data: str | None = None
    eval_fraction: float = Field(0.05, gt=0.0, lt=1.0)
    steps: int = Field(200, ge=1)
    batch_size: int = Field(16, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(2e-4, gt=0.0)
    max_length: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    r_init: int = Field(8, ge=1)
    r_target: int = Field(16, ge=1)
    r_max: int = Field(32, ge=1)
    alpha: float | None = Field(None, gt=0.0)
    gamma: float = Field(1.0, ge=0.0)
    timetable: Literal["early", "late"] = "early"
    warmup_steps: int | None = Field(None, ge=0)
    growth_interval: int | None = Field(None, ge=1)
    growth_end: int | None = Field(None, ge=0)
    max_growth: int | None = Field(None, ge=1)
    policy: str = "greedy"
    scope: str = "layer"
    router: Literal["frozen", "after_warmup", "trainable"] = "frozen"
    layout: Literal["pooled", "masked"] = "pooled"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    gradient_checkpointing: bool = False
    save_every: int | None = Field(None, ge=1)

    def allocator_config(self) -> AllocatorConfig:
        """The allocation of this run; a window that is not given follows from the steps."""
        given = {
            "warmup_steps": self.warmup_steps,
            "growth_interval": self.growth_interval,
            "growth_end": self.growth_end,
            "max_growth": self.max_growth,
        }
        return AllocatorConfig.for_training(
            self.steps,
            timetable=self.timetable,
            r_init=self.r_init,
            r_target=self.r_target,
            r_max=self.r_max,
            gamma=self.gamma,
            policy=self.policy,
            scope=self.scope,
            seed=self.seed,
            **{name: value for name, value in given.items() if value is not None},
        )

    def uniform(self) -> FinetuneOptions:
        """The same run with static LoRA at the same budget, to compare with."""
        return self.model_copy(update={"policy": "uniform", "scope": "layer"})


def embedded_defaults() -> dict[str, object]:
    """Options of the run without arguments: the shipped model and task."""
    return {
        "model": str(MODEL_DIR),
        "data": str(TRAIN_FILE),
        "eval_data": str(TEST_FILE),
        "learning_rate": 5e-3,
        "max_length": 128,
        "r_init": 2,
        "r_target": 4,
        "r_max": 12,
    }


def is_local(name: str) -> bool:
    """True if a model or data argument is meant as a path rather than as an id of a hub."""
    path = Path(name).expanduser()
    return (
        path.exists()
        or path.is_absolute()
        or name.startswith(("./", "../", "~"))
        or bool(path.suffix in {".jsonl", ".json", ".txt"})
    )
