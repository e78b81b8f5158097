"""Options of a fine-tuning run: the command line and recipes follow these fields."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import model_validator

from drlora_core import AllocatorConfig
from drlora_core.validation import reword_errors
from drlora_torch.errors import RunError
from drlora_torch.finetune import groups

DEFAULT_STEPS = 200
BY_TIMETABLE = ("r_init", "warmup_steps", "growth_interval", "growth_end", "max_growth")


class FinetuneOptions(
    groups.WatchGroup,
    groups.TrainingGroup,
    groups.RestGroup,
    groups.RankGroup,
    groups.DataGroup,
    groups.ModelGroup,
):
    """What a run trains, on what and how; where it runs is in :class:`~.recipe.Recipe`.

    Fields that :class:`drlora_core.AllocatorConfig` or :func:`drlora_torch.attach` have too are
    passed on by name.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for unknown fields, values out of range and
            options that exclude each other; from :meth:`allocator_config` for impossible ranks or
            an impossible window.

    Example:
        >>> options = FinetuneOptions(model="my-model", data="my.jsonl", steps=100)
        >>> options.allocator_config().growth_steps
        (7, 9, 11, 13, 15, 17, 19, 21)
        >>> FinetuneOptions.model_validate_json(options.model_dump_json()) == options
        True
    """

    @model_validator(mode="after")
    def _check(self) -> FinetuneOptions:
        for wrong, reason in (
            (self.steps and self.epochs, "give steps or epochs, not both"),
            (self.streaming and not self.steps, "streaming needs steps: DATA is not counted first"),
            (self.patience and not self.eval_every, "patience needs eval_every"),
            (
                self.patience and self.save_every,
                "with patience, checkpoints are written at every evaluation; leave save_every out",
            ),
            (
                self.attention_rank is None and (self.attention_alpha or self.attention_targets),
                "attention_alpha and attention_targets need attention_rank",
            ),
            (
                self.method != "dpo" and self.beta != self._default("beta"),
                "beta needs method dpo",
            ),
            (
                self.policy != "move" and self.move_share != self._default("move_share"),
                "move_share needs policy move",
            ),
            (
                self.policy not in ("prune", "move") and self.r_min != self._default("r_min"),
                "r_min needs policy prune or move",
            ),
            (
                self.r_target == 1
                and self.r_init is None
                and self.policy not in ("uniform", "prune", "move"),
                "r_target 1 leaves nothing to grow; use policy uniform, or r_init 0",
            ),
            (
                self.eval_data and self.eval_fraction != self._default("eval_fraction"),
                "eval_fraction is of DATA; with eval_data, leave it out",
            ),
            (
                self.method == "dpo" and (self.packing or self.streaming),
                "dpo takes neither packing nor streaming",
            ),
            (
                self.method == "dpo" and self.train_on == "all",
                "dpo compares answers only; leave train_on out",
            ),
        ):
            if wrong:
                raise ValueError(reason)
        return self

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    @classmethod
    def _default(cls, name: str) -> object:
        return cls.model_fields[name].default

    @property
    def planned_steps(self) -> int:
        """Optimizer steps; those of a run with ``epochs`` are known once it is resolved."""
        return self.steps or DEFAULT_STEPS

    @property
    def learning_rate_warmup(self) -> int:
        """Steps in which the learning rate rises; at least one unless ``warmup_ratio`` is 0."""
        steps = math.floor(self.planned_steps * self.warmup_ratio + 1e-9)
        return max(steps, 1) if self.warmup_ratio else 0

    @property
    def steps_between_checkpoints(self) -> int:
        """As given, or a quarter of the steps; with ``patience``, at every evaluation."""
        if self.patience and self.eval_every:
            return self.eval_every
        return self.save_every or max(self.planned_steps // 4, 1)

    def allocator_config(self) -> AllocatorConfig:
        """Return the allocator's configuration; what is not given of a timetable follows it."""
        shared = set(AllocatorConfig.model_fields)
        fields = self.model_dump(include=shared, exclude_none=True)
        if self.adapter and self.r_init is None and self.policy != "prune":
            fields["r_init"] = max(self.r_target // 2, 1)  # the LoRA to start from is cut to it
        return AllocatorConfig.for_training(self.planned_steps, timetable=self.timetable, **fields)

    def resolved(self, rows: int | None) -> FinetuneOptions:
        """Return the options with steps, window, starting rank and scales as numbers.

        A run that is later extended keeps its window.

        Args:
            rows: rows of an epoch that a step's rows are taken from; None if that is not known.

        Example:
            >>> options = FinetuneOptions(model="m", data="d.jsonl", epochs=2, batch_size=8)
            >>> options.resolved(100).steps
            26
        """
        steps = self.planned_steps
        if self.epochs is not None and rows is not None:
            per_epoch = math.ceil(rows / (self.batch_size * self.accumulation))
            steps = max(1, math.ceil(self.epochs * per_epoch))
        fixed = self.model_copy(update={"steps": steps, "epochs": None})
        config = fixed.allocator_config()
        chosen = {name: getattr(config, name) for name in BY_TIMETABLE}
        if self.policy in ("uniform", "prune"):
            chosen["max_growth"] = self.max_growth
        alpha = 2.0 * self.r_target if self.alpha is None else self.alpha
        return fixed.model_copy(update={**chosen, "alpha": alpha})

    def uniform(self) -> FinetuneOptions:
        """Return the options of static LoRA at the same budget, to compare with."""
        return self.model_copy(update={"policy": "uniform", "scope": "layer", "r_init": None})

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


def is_local(name: str) -> bool:
    """Return True if a model or data argument is a path rather than an id on a hub."""
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or path.suffix in {
        ".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz", ".yaml",
    }  # fmt: skip
    return looks_local or name.startswith(("./", "../", "~")) or path.exists()
