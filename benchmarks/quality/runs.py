"""The runs of results files, by setting, method, learning rate and seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.quality import results_file
from benchmarks.quality.errors import StudyError
from benchmarks.quality.records import Method, RunRecord, RunSpec, Training
from benchmarks.quality.tasks import HELD_OUT

Metric = Callable[[RunRecord], float]
RANK = 2
"""Mean rank of the claims, unless they say otherwise."""
HELD_OUT_FILES = "heldout"
"""Prefix of results files with held-out runs; the tasks of ``HELD_OUT`` are held out as well."""


def test_loss(record: RunRecord) -> float:
    """Test loss, nats per completion token."""
    return record.test_loss


def exact_match(record: RunRecord) -> float:
    """Exact match on the test split, 0 to 100."""
    return 100 * record.test_exact_match


@dataclass(frozen=True)
class Setting:
    """Model, task and training settings; methods are compared within a setting."""

    model: str
    task: str
    training: Training
    held_out: bool = False
    """True if no method was developed on it."""

    @property
    def name(self) -> str:
        """``model / task``; only the last part of a path."""
        return f"{_last_part(self.model)} / {_last_part(self.task)}"


def _last_part(name: str) -> str:
    path = Path(name.split(",", maxsplit=1)[0])
    return path.stem if path.suffix == ".jsonl" else path.name if path.is_absolute() else name


@dataclass
class Cell:
    """The runs of one method in one setting."""

    method: Method
    runs: dict[float, dict[int, RunRecord]] = field(default_factory=dict)
    """By learning rate and seed."""

    @cached_property
    def refused(self) -> str | None:
        """Why the method was refused, or None."""
        return next((r.refused for seeds in self.runs.values() for r in seeds.values()), None)

    @cached_property
    def tuning_seeds(self) -> tuple[int, ...]:
        """Seeds on which every learning rate ran."""
        return tuple(sorted(set.intersection(*(set(seeds) for seeds in self.runs.values()))))

    @cached_property
    def rate(self) -> float | None:
        """The best learning rate: the one with the lowest validation loss over the tuning seeds."""
        return self.best(self.runs)

    def best(self, rates: Collection[float]) -> float | None:
        """The best of the given learning rates; None if there is no run."""
        rates = [rate for rate in sorted(rates) if rate in self.runs]
        if self.refused or not rates or not self.tuning_seeds:
            return None
        return min(rates, key=self.validation)

    def validation(self, rate: float) -> float:
        """Mean validation loss at a learning rate over the tuning seeds."""
        return float(np.mean([self.runs[rate][s].validation_loss for s in self.tuning_seeds]))

    @property
    def at_edge(self) -> bool:
        """True if the best learning rate is the smallest or largest of the grid."""
        return len(self.runs) > 1 and self.rate in (min(self.runs), max(self.runs))

    def chosen(self) -> dict[int, RunRecord]:
        """Runs at the best learning rate by seed, without diverged ones."""
        return {} if self.rate is None else self.at(self.rate)

    def at(self, rate: float) -> dict[int, RunRecord]:
        """Runs at a learning rate by seed, without diverged ones."""
        runs = sorted(self.runs.get(rate, {}).items())
        return {seed: r for seed, r in runs if not r.diverged and r.refused is None}

    def diverged(self) -> int:
        """Number of diverged runs at the best learning rate."""
        runs = self.runs[self.rate].values() if self.rate is not None else ()
        return sum(record.diverged for record in runs)

    def values(self, metric: Metric) -> np.ndarray:
        """The metric of the chosen runs, ordered by seed."""
        return np.array([metric(record) for record in self.chosen().values()])


def differences(
    cell: Cell, base: Cell, metric: Metric = test_loss, rate: float | None = None
) -> np.ndarray:
    """Metric of one method minus that of another, for every seed that both have.

    Args:
        cell: the first method.
        base: the second method.
        metric: what to compare.
        rate: learning rate of both; None: the best of each, among those that both tried.
    """
    both = cell.runs.keys() & base.runs.keys() if rate is None else {rate}
    mine, other = cell.best(both), base.best(both)
    if mine is None or other is None:
        return np.array([])
    ours, theirs = cell.at(mine), base.at(other)
    return np.array([metric(ours[s]) - metric(theirs[s]) for s in ours if s in theirs])


@dataclass
class Results:
    """All runs, as ``cells[setting][method name]``."""

    cells: dict[Setting, dict[str, Cell]] = field(default_factory=dict)
    records: list[RunRecord] = field(default_factory=list)

    def settings(self, *, held_out: bool | None = None) -> list[Setting]:
        """All settings, or only those that are (not) held out."""
        return [s for s in self.cells if held_out is None or s.held_out == held_out]

    def primary(self, *, held_out: bool | None = None, rank: int = RANK) -> list[Setting]:
        """One setting per model and task, of a mean rank: the one with the most runs."""
        chosen: dict[tuple[str, str, bool], Setting] = {}
        for setting in self.settings(held_out=held_out):
            if setting.training.r_target != rank:
                continue
            first = chosen.setdefault((setting.model, setting.task, setting.held_out), setting)
            if self._runs(setting) > self._runs(first):
                chosen[setting.model, setting.task, setting.held_out] = setting
        return list(chosen.values())

    def _runs(self, setting: Setting) -> int:
        return sum(len(s) for cell in self.cells[setting].values() for s in cell.runs.values())

    def label(self, setting: Setting) -> str:
        """Name of a setting, and its differences from the primary one of its model and task."""
        of_this = (setting.model, setting.task, setting.held_out)
        primary = self.primary()
        same = [s for s in primary if (s.model, s.task, s.held_out) == of_this]
        first = next(iter([*same, *primary]), setting)
        differing = [
            f"{field.replace('_', ' ')} {value}"
            for field, value in setting.training
            if getattr(first.training, field) != value
        ]
        return ", ".join([setting.name, *differing]) + (" (held out)" if setting.held_out else "")

    def methods(self, settings: Iterable[Setting] | None = None) -> list[str]:
        """Methods that have runs in the given settings (default: all)."""
        chosen = self.cells if settings is None else settings
        return list(dict.fromkeys(name for setting in chosen for name in self.cells[setting]))

    def groups(
        self,
        method: str,
        base: str,
        metric: Metric = test_loss,
        settings: Iterable[Setting] | None = None,
    ) -> dict[Setting, np.ndarray]:
        """Paired differences of two methods, for every setting that has both."""
        found = {}
        for setting in self.cells if settings is None else settings:
            cells = self.cells[setting]
            if method in cells and base in cells:
                values = differences(cells[method], cells[base], metric)
                if values.size:
                    found[setting] = values
        return found

    def add(self, record: RunRecord, setting: Setting) -> None:
        """Add a run.

        Of two runs with the same specification, the first is kept, unless only the second has
        effective ranks.

        Raises:
            StudyError: different methods have the same name in one setting.
        """
        spec = record.spec
        cells = self.cells.setdefault(setting, {})
        cell = cells.setdefault(spec.method.name, Cell(spec.method))
        if cell.method != spec.method:
            raise StudyError(
                f"two methods are called {spec.method.name!r} in {setting.name}: "
                f"{cell.method!r} and {spec.method!r}; give them different names"
            )
        seeds = cell.runs.setdefault(spec.learning_rate, {})
        known = seeds.get(spec.seed)
        if known is None:
            self.records.append(record)
        elif known.effective_ranks or not record.effective_ranks:
            return
        else:
            self.records[self.records.index(known)] = record
        seeds[spec.seed] = record


def read(paths: Sequence[Path]) -> Results:
    """Read results files.

    Raises:
        StudyError: a file is missing or incomplete, a line is not a run, or different methods have
            the same name.
    """
    results = Results()
    for path in paths:
        records = _records(path)
        shared = [r.spec.training for r in records if not r.spec.method.training]
        for record in records:
            spec = record.spec
            training = _study_training(spec, shared)
            held_out = spec.task in HELD_OUT or path.name.startswith(HELD_OUT_FILES)
            results.add(record, Setting(spec.model, spec.task, training, held_out))
    return results


def _records(path: Path) -> list[RunRecord]:
    if not path.is_file():
        raise StudyError(f"no results file {path}; `python -m benchmarks.quality run` writes one")
    if not path.read_bytes().endswith(b"\n"):
        raise StudyError(
            f"{path}: the last line is cut off; run the study again to repeat that run"
        )
    return results_file.read(path)


def _study_training(spec: RunSpec, shared: Sequence[Training]) -> Training:
    """The training settings of the study, without the changes of the method."""
    changes = spec.method.training
    matching = (
        base
        for base in dict.fromkeys(shared)
        if Training.model_validate(base.model_dump() | changes) == spec.training
    )
    return next(matching, spec.training) if changes else spec.training
