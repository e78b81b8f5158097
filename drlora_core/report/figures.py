"""The figures of a report, with what a reader should see in each."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from drlora_core import notebook, plots
from drlora_core.plots.style import MARKED_EVENTS
from drlora_core.runs import Run

MOST_LAYERS = 64
LAYER_NAME = 60  # characters
WHAT_EVENTS_DO = {
    "grow": "after which experts have more rank to learn with",
    "prune": "which cut the least important dimensions",
    "move": "which cut the least important dimensions and give their rank to other experts",
}
TOTAL = {
    "grow": "All experts together. Where the run lies below the plan, limits kept an event from "
    "placing its share; the next event catches up.",
    "prune": "All experts together: what each event of the plan leaves.",
    "move": "All experts together. An event moves rank, and grows only up to the budget.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """A figure on the page, or several, of which the reader chooses one."""

    key: str
    title: str
    text: str
    variants: dict[str, Any]
    """Plotly figures by the name in the list of choices."""

    @property
    def height(self) -> int:
        """In pixels."""
        return max(int(figure.layout.height) for figure in self.variants.values())


def loss_card(run: Run, against: Run | None) -> Card | None:
    """Make the figure of the loss, if it is known."""
    if not len(run.losses.training) and not len(run.losses.held_out):
        return None
    text = [
        "Thin lines: loss of each batch. Thick lines: its running mean.",
        "Diamonds: held-out loss." if len(run.losses.held_out) else "",
        f"Points: {run.event_noun}s, {WHAT_EVENTS_DO[_kind(run)]}." if run.events else "",
    ]
    return _card("loss", " ".join(filter(None, text)), plots.loss(run, against))


def map_card(run: Run) -> Card:
    """Make the map of ranks."""
    text = "Hover over an expert for its numbers."
    if run.events:
        text = f"Move the slider to see how ranks changed. {text}"
    return _card("map", text, plots.rank_map(run))


def growth_cards(run: Run) -> Iterator[Card]:
    """Make the figures that say how ranks came about; static LoRA has the signals alone."""
    if run.config.ranks_change:
        yield _card("total", TOTAL[_kind(run)], plots.total_rank(run))
        text = (
            "The experts that ended with the most rank, of equal ones those that got there first, "
            "and the range of the others."
        )
        yield _by_layer("trajectories", "Ranks of a layer", text, run, plots.trajectories)
    text = (
        "What the allocation saw: how often the router uses an expert (f), how much its LoRA "
        "matters to the loss (g), and the saliency S made of both, which orders the experts."
    )
    if run.events:
        mark = "Dotted lines are" if len(run.events) <= MARKED_EVENTS else "Gray is the time of"
        text += f" {mark} {run.event_noun}s."
        text += "" if run.config.policy == "prune" else " g starts anew for experts that grew."
    yield _by_layer("signals", "f, g and S of a layer", text, run, plots.signals)


def spread_cards(run: Run) -> Iterator[Card]:
    """Make the figures that say how ranks are spread."""
    yield _card("histogram", "", plots.rank_histogram(run))
    if not np.isnan(run.recording.routing).all():
        yield _card(
            "routing",
            "Experts that the router uses more need not matter more: those above the others at "
            "the same routing have a larger importance.",
            plots.rank_against_routing(run),
        )
    if not run.events and run.final.min() == run.final.max():
        return  # all equal
    yield _card("lorenz", "The further below the diagonal, the fewer hold most.", plots.lorenz(run))
    text = (
        "Means over layers; gray: from the least to the largest. Equal ranks have entropy 1 and "
        "Gini 0."
    )
    yield _card("spread", text, plots.spread(run))


def comparison_cards(run: Run, against: Run) -> Iterator[Card]:
    """Make the figures that compare the final ranks of two runs."""
    text = "Units of rank that this run gives to an expert beyond what the other gives it."
    yield _card("difference", text, plots.rank_difference(run, against))
    yield _card(
        "overlap",
        "Share of rank units that both runs give to the same experts. Equal ranks overlap too: "
        "the marks show what chance would give.",
        plots.overlap_by_layer(run, against),
    )


def _kind(run: Run) -> str:
    """What events do to ranks: a key of the texts above."""
    return run.config.policy if run.config.cuts else "grow"


def _card(key: str, text: str, figure: Any) -> Card:
    title = html.unescape(figure.layout.title.text or "")  # the page escapes it
    return Card(key, title, text, {"": figure})


def _by_layer(key: str, title: str, text: str, run: Run, draw: Callable[[Run, str], Any]) -> Card:
    """Make a figure for each layer; of very many layers, for those whose ranks differ most."""
    final = {name: run.final[part] for name, part in run.places.items()}
    chosen = sorted(final, key=lambda name: -float(final[name].std()))
    shown = set(chosen[:MOST_LAYERS])
    first = chosen[0]
    order = [first, *(name for name in run.layers if name in shown and name != first)]
    if len(final) > MOST_LAYERS:
        text += f" The {MOST_LAYERS} layers of {len(final)} whose ranks differ most."
    names = {name: notebook.shorten(name, LAYER_NAME) for name in order}
    if len(set(names.values())) < len(names):  # cut alike
        names = {name: f"{number}: {cut}" for number, (name, cut) in enumerate(names.items())}
    return Card(key, title, text, {names[name]: draw(run, name) for name in order})
