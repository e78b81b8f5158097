"""Render the report of a run as one HTML page."""

from __future__ import annotations

import platform
import shlex
from importlib import metadata
from typing import Any

from drlora_core.comparison import chance_overlap, mean_of_defined, overlap
from drlora_core.config import AllocatorConfig
from drlora_core.errors import LayoutError, import_extra
from drlora_core.recording import Recording
from drlora_core.replay import CAVEAT
from drlora_core.report import figures, payload
from drlora_core.report.headline import headline, tiles
from drlora_core.report.rows import configuration_rows, event_rows, top_experts
from drlora_core.report.verdicts import check
from drlora_core.runs import Run, from_recording, tell_apart
from drlora_core.runs.folder import RECIPE

LIBRARIES = ("drlora", "numpy", "plotly")


def render(
    recording: Recording,
    config: AllocatorConfig | None = None,
    title: str = "Run",
    against: Run | None = None,
) -> str:
    """Render the report of a recording as one HTML page.

    A given ``config`` replaces the run's own: the page then shows a replay under it.

    Raises:
        LayoutError: there is no configuration, or ``against`` has other layers.
        DRLoRAError: a library of the extra ``report`` is missing.
    """
    return render_run(from_recording(recording, config, title), against)


def render_run(run: Run, against: Run | None = None, *, version: str = "") -> str:
    """Render the report of a run as one HTML page that needs no other file and no network.

    Args:
        run: opened with `drlora_core.runs.open_run`.
        against: a run with the same layers to compare with.
        version: of the page, which asks the server that it comes from whether there is another one.

    Raises:
        LayoutError: the runs have different layers.
        DRLoRAError: a library of the extra ``report`` is missing.
    """
    if against is not None and against.layers != run.layers:
        raise LayoutError(
            f"{against.name} has other layers than {run.name}, so that their ranks cannot be "
            f"compared: {list(against.layers.items())[:3]} and {list(run.layers.items())[:3]}"
        )
    if against is not None:
        against = tell_apart(run, against)
    cards = {
        "loss": [card for card in [figures.loss_card(run, against)] if card is not None],
        "map": [figures.map_card(run)],
        "growth": list(figures.growth_cards(run)),
        "spread": list(figures.spread_cards(run)),
        "comparison": [] if against is None else list(figures.comparison_cards(run, against)),
    }
    script = payload.read_template("report.js")
    page: str = _template().render(
        run=run,
        against=against,
        version=version,
        style=payload.read_template("report.css"),
        script=script,
        script_hashes=[payload.script_hash(each) for each in (script, payload.plotly_source())],
        plotly=payload.packed_plotly(),
        figures=payload.pack_figures(card for group in cards.values() for card in group),
        cards=cards,
        headline=headline(run),
        tiles=tiles(run),
        verdicts=check(run),
        experts=top_experts(run),
        methods=_methods(run, against),
        similarity=None if against is None else _similarity(run, against),
        events=event_rows(run),
        configuration=configuration_rows(run.config),
        command=_command(run),
        versions=_versions(),
        caveat=CAVEAT,
    )
    return page


def _template() -> Any:
    jinja2 = import_extra("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drlora_core"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _methods(run: Run, against: Run | None) -> list[dict[str, Any]]:
    """Return a row for the run and each method that it can be compared with, if any."""
    rivals = [(name, outcome) for name, _, outcome in run.compared]
    if against is not None and against.loss_unit == run.loss_unit:
        rivals.append((against.name, against.outcome))
    if not rivals:
        return []
    return [
        {
            "method": name,
            "held-out loss before": outcome.loss_before,
            "held-out loss after": outcome.loss_after,
            "tokens per second": outcome.tokens_per_second,
        }
        for name, outcome in [(f"{run.name} (this run)", run.outcome), *rivals]
        if outcome is not None
    ]


def _similarity(run: Run, against: Run) -> str:
    """Say in a sentence how much two allocations have in common."""
    pairs = [(run.final[part], against.final[part]) for part in run.places.values()]
    shared = mean_of_defined([overlap(*pair) for pair in pairs])
    chance = mean_of_defined([chance_overlap(*pair) for pair in pairs])
    differing = int((run.final != against.final).sum())
    return (
        f"Both give {shared:.0%} of the rank of a layer to the same experts; chance would give "
        f"{chance:.0%}. {differing:,} of {run.recording.num_experts:,} experts differ."
    )


def _command(run: Run) -> str | None:
    """Return the command that repeats the run, or that replays its decisions.

    None where there is no folder, or its name is no text that a command line could have.
    """
    if run.path is None or not str(path := run.path.resolve()).isprintable():
        return None
    if run.recipe is not None:
        recipe = shlex.quote(str(path / RECIPE))
        return f"drlora finetune --config {recipe} --output {shlex.quote(run.name + '-again')}"
    return f"drlora replay {shlex.quote(str(path))}"


def _versions() -> str:
    """Name the versions that wrote the page."""
    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
