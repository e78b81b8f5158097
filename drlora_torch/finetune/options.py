"""Options of a fine-tuning run: the command line and configuration files follow these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from drlora_core import AllocatorConfig
from drlora_core.config import PolicyName, ScopeName, TimetableName
from drlora_torch.embedded import MODEL_DIR, TEST_FILE, TRAIN_FILE
from drlora_torch.errors import RunError


class FinetuneOptions(BaseModel):
    """Options of ``drlora finetune``, each declared once: type, default, range and help text.

    The command line has one option per field (:mod:`drlora_torch.finetune.signature`), and the
    folder of a run keeps them as JSON. Fields that :class:`drlora_core.AllocatorConfig` or
    :func:`drlora_torch.attach` have too are passed on by name.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for unknown fields and values out of range;
            from :meth:`allocator_config` for impossible ranks or an impossible window.

    Example:
        >>> options = FinetuneOptions(model="my-model", data="my.jsonl", steps=100)
        >>> options.allocator_config().growth_steps
        (7, 9, 11, 13, 15, 17, 19, 21)
        >>> FinetuneOptions.model_validate_json(options.model_dump_json()) == options
        True
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    model: str
    """Hugging Face id or local folder of a mixture-of-experts model."""
    data: str
    """Training data: a .jsonl, .json or .txt file, or a dataset id, with columns text, prompt and
    completion, or messages."""
    eval_data: str | None = None
    """Held-out data, in the same formats as DATA. If not given, the validation or test split of
    DATA, or a random part of it."""
    eval_fraction: float = Field(0.05, gt=0.0, lt=1.0)
    """Fraction of DATA to hold out if it has no split for it."""
    steps: int = Field(200, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Rows per device and forward pass."""
    accumulation: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(2e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    max_length: int = Field(512, ge=2)
    """Longest row in tokens; the rest is cut off."""
    seed: int = Field(0, ge=0)
    """Seed of the data order, the rows of A and the policy."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model; auto is float32 on a CPU and that of the checkpoint on a GPU."""
    load_in_4bit: bool = False
    """Load the experts and the Linears of the rest in NF4, with bitsandbytes."""
    quantization: Literal["none", "nf4", "fp4", "fp8", "mxfp4"] = "none"
    """How the experts are stored: as they are loaded (none), packed while loading (nf4, fp4), or
    packed as the checkpoint has them (fp8, mxfp4)."""
    r_init: int = Field(8, ge=1)
    """Rank of every expert at the start."""
    r_target: int = Field(16, ge=1)
    """Mean rank at the end, which is the budget."""
    r_max: int = Field(32, ge=1)
    """Largest rank of one expert."""
    alpha: float | None = Field(None, gt=0.0)
    """Scale the LoRA update by alpha / r_target. If not given, 2 * r_target."""
    gamma: float = Field(1.0, ge=0.0)
    """Exponent of the rank penalty in the saliency."""
    timetable: TimetableName = "early"
    """Ranks grow between 5 and 25 % (early) or 10 and 60 % (late) of the steps."""
    warmup_steps: int | None = Field(None, ge=0)
    """Optimizer steps before growth. If not given, by the timetable."""
    growth_interval: int | None = Field(None, ge=1)
    """Optimizer steps from one growth event to the next. If not given, as many as make at most 8
    events."""
    growth_end: int | None = Field(None, ge=0)
    """Last optimizer step of growth. If not given, by the timetable."""
    max_growth: int | None = Field(None, ge=1)
    """Most ranks that an expert gains per event. If not given, an expert that wins every event
    reaches r_max at the last one."""
    policy: PolicyName = "greedy"
    """How the new ranks go to the experts."""
    scope: ScopeName = "layer"
    """Whether each layer has a quota of its own or all layers share one."""
    router: Literal["frozen", "after_warmup", "trainable"] = "frozen"
    """Whether the routers are trained; after_warmup: from step warmup_steps on."""
    layout: Literal["pooled", "masked"] = "pooled"
    """Storage of the ranks: shared by the experts (pooled) or r_max for each (masked)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability on the LoRA inputs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    save_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints. If not given, a quarter of the steps."""

    def allocator_config(self) -> AllocatorConfig:
        """Return the allocator's configuration; a window that is not given follows the steps."""
        shared = set(AllocatorConfig.model_fields)
        fields = self.model_dump(include=shared, exclude_none=True)
        return AllocatorConfig.for_training(self.steps, timetable=self.timetable, **fields)

    def uniform(self) -> FinetuneOptions:
        """Return the options of static LoRA at the same budget, to compare with."""
        return self.model_copy(update={"policy": "uniform", "scope": "layer"})

    def shared_by(self, processes: int, begun_with: int | None) -> FinetuneOptions:
        """Return the options with which some processes go on with a run that others began.

        A step has the same rows. The batch of a process does not grow, so that it fits into memory
        as before; a process that has more rows than that accumulates.

        Raises:
            RunError: the rows of a step cannot be shared equally.

        Example:
            >>> options = FinetuneOptions(model="m", data="d.jsonl", batch_size=8, steps=100)
            >>> options.shared_by(1, begun_with=4).accumulation
            4
        """
        if begun_with is None or processes == begun_with:
            return self
        rows = self.batch_size * self.accumulation * begun_with
        if rows % processes:
            raise RunError(
                f"a step of this run has {rows} rows, which {processes} processes cannot share "
                f"equally; resume it with --processes {begun_with}, or another divisor of {rows} "
                "(times --tp-size, whose processes have the same rows)"
            )
        share = rows // processes
        batch = max(size for size in range(1, self.batch_size + 1) if share % size == 0)
        return self.model_copy(update={"batch_size": batch, "accumulation": share // batch})


def embedded_defaults() -> dict[str, object]:
    """Return the options of a run without arguments: the shipped model and task."""
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
    """Return True if a model or data argument is a path rather than an id on a hub."""
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or path.suffix in {".jsonl", ".json", ".txt"}
    return looks_local or name.startswith(("./", "../", "~")) or path.exists()
