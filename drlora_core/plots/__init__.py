"""Figures of a run, as Plotly figures (extra ``report``); the HTML report shows them.

Each function takes a run: a :class:`~drlora_core.Recording`, of which it draws the recorded
decisions; a replay, ``drlora_core.replay(recording, config)``, which draws what another
configuration would decide; or :func:`drlora_core.runs.open_run` of a run's folder, which also knows
its losses. They raise LayoutError for a recording without a configuration.

Example::

    from drlora_core import plots
    from drlora_core.runs import open_run

    run = open_run("my-run")
    plots.rank_map(run).show()
    plots.loss(run).write_html("loss.html")
"""

from drlora_core.plots.comparison import overlap_by_layer, rank_difference
from drlora_core.plots.inequality import lorenz, spread
from drlora_core.plots.loss import loss
from drlora_core.plots.rank_histogram import rank_histogram
from drlora_core.plots.rank_map import rank_map
from drlora_core.plots.routing import rank_against_routing
from drlora_core.plots.signals import signals
from drlora_core.plots.total_rank import total_rank
from drlora_core.plots.trajectories import trajectories

__all__ = [
    "lorenz",
    "loss",
    "overlap_by_layer",
    "rank_against_routing",
    "rank_difference",
    "rank_histogram",
    "rank_map",
    "signals",
    "spread",
    "total_rank",
    "trajectories",
]
