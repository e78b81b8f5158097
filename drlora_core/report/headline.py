"""The headline of a report: what a person would say of the run, in two or three sentences."""

from __future__ import annotations

import dataclasses

import numpy as np

from drlora_core import notebook
from drlora_core.ema import IntArray
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
        change = "unchanged" if _as_read(before) == _as_read(after) else change
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
        before, after = _as_read(outcome.loss_before), _as_read(outcome.loss_after)
        verb = "fell" if outcome.loss_after < outcome.loss_before else "did not fall: it went"
        went = f"stayed at {after}" if before == after else f"{verb} from {before} to {after}"
        unit = f" {NATS}" if run.loss_unit == NATS else ""
        text = f"In {notebook.count(trained, 'step')} the held-out loss {went}{unit}"
        rivals = [
            f"{_method(name)} with the same budget reached {other.loss_after:.3f}"
            for name, _, other in run.compared
            if other is not None
        ]
        return f"{text}; {', '.join(rivals)}." if rivals else f"{text}."
    losses = run.losses
    known = [
        (int(steps[-1]), name, values)
        for name, steps, values in (
            ("held-out", losses.held_out_steps, losses.held_out),
            ("training", losses.steps, losses.training),
        )
        if len(steps)
    ]
    if known:  # the newest; of two, the held-out one, which does not depend on a batch
        last, name, values = max(known, key=lambda each: (each[0], each[1] == "held-out"))
        began = f"; it began at {_as_read(values[0])}" if len(values) > 1 else ""
        done = f"After {last:,} of {run.last_step:,} steps"
        return f"{done} the {name} loss is {_as_read(values[-1])}{began}."
    size = notebook.describe_layers(run.starts)
    done = notebook.count(run.recording.steps, "step")
    return f"The statistics of {done} were recorded, of {size}, and no loss."


def _as_read(loss: float) -> str:
    return f"{loss:.3f}"


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
    """Say how concentrated the growth is, and which experts gained the most."""
    gained = np.maximum(run.final - run.ranks[0], 0)
    if not gained.any():
        return _what_is_left(run) if run.events and run.final.any() else ""
    half = f"Half of the growth went to {_few(gained)}"
    most = int(gained.argmax())
    tied = np.flatnonzero(gained == gained[most])
    if len(tied) > 1:
        reached = np.unique(run.final[tied])
        what = f"rank {reached[0]}" if len(reached) == 1 else f"{gained[most]} units more"
        return f"{half}; {len(tied):,} experts gained the most, up to {what}."
    name = next(layer for layer, part in run.places.items() if part.start <= most < part.stop)
    expert = most - run.places[name].start
    layer = notebook.shorten(name, CHARACTERS)
    return (
        f"{half}, most of all to expert {expert} of {layer}, from rank {run.ranks[0][most]} to "
        f"{run.final[most]}."
    )


def _what_is_left(run: Run) -> str:
    """Say how concentrated the rank is that pruning left."""
    without = int((run.final == 0).sum())
    none = f"; {notebook.count(without, 'expert')} have none" if without else ""
    return f"Half of the rank that is left belongs to {_few(run.final)}{none}."


def _few(values: IntArray) -> str:
    """Name the smallest group of experts that has half of a total."""
    cumulated = np.cumsum(np.sort(values)[::-1])
    few = int(np.searchsorted(cumulated, cumulated[-1] / 2)) + 1
    return f"{notebook.count(few, 'expert')} of {values.size:,} ({few / values.size:.0%})"


def _method(name: str) -> str:
    return "uniform LoRA" if name == "uniform" else notebook.shorten(name, CHARACTERS)
