"""The headline of a report: what a person would say of the run, in two or three sentences."""

from __future__ import annotations

import dataclasses

import numpy as np

from drlora_core import notebook
from drlora_core.runs import Run
from drlora_core.runs.recipe import NATS

CHARACTERS = 60


def headline(run: Run) -> list[str]:
    """Return the sentences: how the loss went, whether the budget was met, where rank went."""
    return [sentence for sentence in (_loss(run), _budget(run), _where(run)) if sentence]


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """A number that the page shows large."""

    label: str
    value: str
    detail: str = ""


def tiles(run: Run) -> list[Tile]:
    """Return the numbers that matter: loss, budget, events, concentration, speed."""
    found = []
    if run.outcome is not None:
        before, after = run.outcome.loss_before, run.outcome.loss_after
        direction = "lower" if after <= before else "higher"
        change = f"{abs(after - before) / abs(before):.0%} {direction}" if before else direction
        found.append(Tile("held-out loss", f"{before:.3f} → {after:.3f}", change))
    final, total = run.final, int(run.final.sum())
    met = "budget met" if total == run.budget else f"budget {run.budget:,}"
    found.append(Tile("total rank", f"{total:,}", met))
    if run.config.ranks_change:
        planned = f"of {run.config.num_events} planned"
        found.append(Tile(f"{run.event_noun}s", str(len(run.events)), planned))
    spread = f"mean {final.mean():.3g}, start {run.ranks[0].mean():.3g}"
    found.append(Tile("rank of an expert", f"{final.min()} to {final.max()}", spread))
    if run.outcome is not None and run.outcome.tokens_per_second:
        memory = run.outcome.peak_memory_mb
        detail = f"peak memory {memory / 1024:.1f} GiB" if memory else ""
        found.append(Tile("tokens per second", f"{run.outcome.tokens_per_second:,.0f}", detail))
    return found


def _loss(run: Run) -> str:
    outcome = run.outcome
    if outcome is not None:
        trained = max(run.recording.steps, run.losses.last_step)
        verb = "fell" if outcome.loss_after < outcome.loss_before else "did not fall: it went"
        text = (
            f"In {notebook.count(trained, 'step')} the held-out loss {verb} from "
            f"{outcome.loss_before:.3f} to {outcome.loss_after:.3f}"
            f"{f' {NATS}' if run.loss_unit == NATS else ''}"
        )
        rivals = [
            f"{_method(name)} with the same budget reached {other.loss_after:.3f}"
            for name, _, other in run.compared
            if other is not None
        ]
        return f"{text}; {', '.join(rivals)}." if rivals else f"{text}."
    losses = run.losses
    if len(losses.training):
        return (
            f"After {losses.last_step:,} of {run.last_step:,} steps the training loss is "
            f"{losses.training[-1]:.3f}; it began at {losses.training[0]:.3f}."
        )
    size = notebook.describe_layers(run.starts)
    return f"{notebook.count(run.recording.steps, 'step')} of {size} were recorded, without a loss."


def _budget(run: Run) -> str:
    start, total, saved = (int(ranks.sum()) for ranks in (run.ranks[0], run.ranks[-1], run.final))
    if not run.config.ranks_change:
        return f"The ranks were fixed: {total:,} rank units, {run.final.mean():.3g} an expert."
    if run.kept < len(run.events):
        return (
            f"The adapter that was saved is that of an earlier step, with {saved:,} rank units, "
            f"and the one that this page describes; the training went on to {total:,}."
        )
    events, planned = len(run.events), run.config.num_events
    done = f"{notebook.count(events, 'event')}" + (f" of {planned}" if events < planned else "")
    if run.config.policy == "prune":
        return f"{done} cut the total rank from {start:,} to {total:,} (budget {run.budget:,})."
    if total == run.budget:
        return f"The budget of {run.budget:,} rank units was met exactly, in {done}."
    return f"{total:,} of {run.budget:,} rank units are placed, in {done}."


def _where(run: Run) -> str:
    """Say how concentrated the growth is, and which expert gained most."""
    gained = np.maximum(run.final - run.ranks[0], 0)
    if not gained.any():
        return ""
    order = np.argsort(-gained, kind="stable")
    cumulated = np.cumsum(gained[order])
    few = int(np.searchsorted(cumulated, cumulated[-1] / 2)) + 1
    most = int(order[0])
    name = next(layer for layer, part in run.places.items() if part.start <= most < part.stop)
    expert = most - run.places[name].start
    layer = notebook.shorten(name, CHARACTERS)
    return (
        f"Half of the growth went to {notebook.count(few, 'expert')} of {gained.size:,} "
        f"({few / gained.size:.0%}), most of all to expert {expert} of {layer}, from rank "
        f"{run.ranks[0][most]} to {run.final[most]}."
    )


def _method(name: str) -> str:
    return "uniform LoRA" if name == "uniform" else notebook.shorten(name, CHARACTERS)
