"""Hand-written notes of the report, whose figures are computed from the runs.

The notes are a Jinja template in which every figure is an expression, such as
``{{ effect("early", "uniform") }}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined, TemplateError

from benchmarks.quality import why
from benchmarks.quality.cells import interval, markdown, spread
from benchmarks.quality.claims import UNIFORM, Comparison, compare
from benchmarks.quality.errors import StudyError
from benchmarks.quality.models import SHIPPED
from benchmarks.quality.runs import Metric, Results, Setting, exact_match, test_loss

Notes = Mapping[str, str]
"""Text by heading."""
Where = str | int | Sequence[str]
CARDS = ("training.json", "figures.json")


class Figures:
    """Functions for the notes.

    ``where`` restricts a comparison to a model or to one setting, by its label, or to several by a
    list; by default all primary settings count, and with a number those of that mean rank.
    Differences are of test loss unless the name says otherwise.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def effect(self, method: str, base: str = UNIFORM, where: Where = "") -> str:
        """Mean difference with its interval."""
        return interval(self._compare(method, base, where).here)

    def won(self, method: str, base: str = UNIFORM, where: Where = "") -> str:
        """Runs with a lower loss, as ``70 of 75``."""
        found = self._compare(method, base, where)
        return f"{found.wins} of {found.here.count}"

    def better(self, method: str, base: str = UNIFORM, where: Where = "") -> str:
        """Settings whose interval is below 0, as ``13 of 15``."""
        found = self._compare(method, base, where)
        return f"{len(found.on_side(-1))} of {len(found.groups)}"

    def worse(self, method: str, base: str = UNIFORM, where: Where = "") -> str:
        """Settings whose interval is above 0, as ``8 of 9``."""
        found = self._compare(method, base, where)
        return f"{len(found.on_side(1))} of {len(found.groups)}"

    def share(self, method: str, of: str, base: str = UNIFORM) -> str:
        """Gain of a method as a share of the gain of another, in the settings of both."""
        groups = self._compare(method, base, "").groups
        settings = [s for s in groups if of in self._results.cells[s]]
        gains = [compare(self._results, each, base, settings=settings) for each in (method, of)]
        return f"{gains[0].here.mean / gains[1].here.mean:.0%}".replace("%", " %")

    def match(self, method: str, where: str) -> str:
        """Mean exact match in percent in one setting."""
        (setting,) = self._select(where)
        return f"{self._values(setting, method, exact_match).mean():.0f} %"

    def dimensions(self, method: str, where: str) -> str:
        """Effective rank and rank of large experts in one setting, as ``3.2 of 5.5``."""
        (setting,) = self._select(where)
        effective, rank = why.large_experts(self._results.cells[setting][method])
        if not rank:
            raise StudyError(f"no effective ranks of {method!r} in {where!r}")
        return f"{effective:.1f} of {rank:.1f}"

    def parameters(self, model: str) -> str:
        """Parameters of a shipped model in millions, from the figures of its card."""
        (path,) = (p for name in CARDS if (p := SHIPPED[model] / name).is_file())
        return f"{json.loads(path.read_text())['parameters'] / 1e6:.1f}"

    def methods(self, where: str) -> str:
        """The methods of one setting as a table, the best first."""
        (setting,) = self._select(where)
        losses = {n: self._values(setting, n, test_loss) for n in self._results.methods([setting])}
        rows = [
            {
                "Method": f"`{name}`",
                "Test loss": spread(losses[name]),
                "Exact match, %": spread(self._values(setting, name, exact_match), 1),
                "Minus `uniform`": self.effect(name, where=where) if name != UNIFORM else "-",
            }
            for name in sorted(losses, key=lambda name: losses[name].mean())
        ]
        return markdown(rows)

    def _values(self, setting: Setting, method: str, metric: Metric) -> np.ndarray:
        return self._results.cells[setting][method].values(metric)

    def _compare(self, method: str, base: str, where: Where) -> Comparison:
        found = compare(self._results, method, base, settings=self._select(where))
        if not found.groups:
            raise StudyError(f"no setting {where!r} with both {method!r} and {base!r}")
        return found

    def _select(self, where: Where) -> list[Setting]:
        if not where:
            return self._results.primary()
        if isinstance(where, int):
            return self._results.primary(rank=where)
        if not isinstance(where, str):
            return [setting for each in where for setting in self._select(each)]
        by_label = [s for s in self._results.settings() if self._results.label(s) == where]
        found = by_label or [s for s in self._results.primary() if s.model == where]
        if not found:
            raise StudyError(f"no setting or model {where!r}")
        return found


def read_notes(path: Path, results: Results) -> Notes:
    """Read the notes: text below each ``## heading``. No file means no notes.

    Raises:
        StudyError: an expression cannot be computed from the results.
    """
    if not path.is_file():
        return {}
    figures = Figures(results)
    functions: dict[str, Callable[..., str]] = {
        name: getattr(figures, name) for name in vars(Figures) if not name.startswith("_")
    }
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        text = template.from_string(path.read_text(encoding="utf-8")).render(functions)
    except (TemplateError, StudyError) as error:
        raise StudyError(f"{path}: {error}") from error
    pieces = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {
        name.strip(): text.strip() for name, text in zip(pieces[::2], pieces[1::2], strict=True)
    }
