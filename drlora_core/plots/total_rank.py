"""Figure: the total rank of all experts, against the plan and the budget."""

from __future__ import annotations

from typing import Any

from drlora_core.events import event_quota
from drlora_core.plots.style import BLUE, GREEN, ORANGE, make_figure, step_layout, step_values
from drlora_core.pools import make_pools
from drlora_core.runs import Drawable, Run, as_run


def total_rank(run: Drawable) -> Any:
    """Draw the total rank of all experts over the steps, the plan of the timetable and the budget.

    The plan is what the configuration's quotas add up to if no limit binds.
    """
    run = as_run(run)
    plan = {
        "name": "plan",
        **plan_values(run),
        "line": {"shape": "hv", "color": ORANGE, "width": 6},
        "opacity": 0.55,
        "hovertemplate": "plan, step %{x}: %{y:,}<extra></extra>",
    }
    total = {
        "name": "run",
        **step_values(run, run.ranks.sum(axis=1)),
        "line": {"shape": "hv", "color": BLUE, "width": 2.5},
        "hovertemplate": "step %{x}: %{y:,} rank units<extra></extra>",
    }
    budget = {
        "name": "budget",
        "x": [0, run.last_step],
        "y": [run.budget, run.budget],
        "line": {"color": GREEN, "width": 1.5, "dash": "dash"},
        "hovertemplate": "budget: %{y:,}<extra></extra>",
    }
    data = [{"type": "scatter", "mode": "lines", **line} for line in (plan, total, budget)]
    layout = step_layout("Total rank against the plan", "rank units of all experts", run)
    return make_figure(data, layout)


def plan_values(run: Run) -> dict[str, list[int]]:
    """Coordinates of the planned total: at the start, after each planned event, and at the end."""
    config, totals = run.config, [0] * (run.config.num_events + 1)
    for pool in make_pools(config, run.layers):
        total = int(run.ranks[0][pool.experts].sum())
        most = pool.num_experts * config.r_target
        totals[0] += total
        for event in range(1, config.num_events + 1):
            if config.policy == "prune":
                total = config.scheduled_total(pool.num_experts, event)
            else:
                total = max(total, min(total + event_quota(config, pool, event), most))
            totals[event] += total
    steps = [0, *(step for step in config.growth_steps if step <= run.last_step)]
    totals = totals[: len(steps)]
    return {"x": [*steps, run.last_step], "y": [*totals, totals[-1]]}
