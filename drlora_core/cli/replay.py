"""``drlora replay``: decisions of policies on recorded statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from drlora_core.cli import common
from drlora_core.comparison import compare
from drlora_core.config import AllocatorConfig, PolicyName
from drlora_core.diagnostics import diagnose
from drlora_core.errors import DRLoRAError, near_misses
from drlora_core.recording import Recording
from drlora_core.replay import CAVEAT, Replay, first_difference, replay
from drlora_core.report import event_rows
from drlora_core.sweep import Sweep, sweep

POLICIES: tuple[str, ...] = get_args(PolicyName)
SHOWN_LAYERS = 8


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("replay", epilog=CAVEAT)(replay_command)


def replay_command(
    recording: Annotated[
        Path,
        typer.Argument(
            help="A recording, a run's directory with one, or a routing trace: an .npz file with "
            "arrays weight_sum [steps, layers, experts] and tokens [steps]."
        ),
    ],
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", help=common.SET_HELP)] = None,
    allocator: Annotated[
        Path | None, typer.Option(help="JSON file of the allocator's configuration.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help=f"Compare policies: 'all' or names of {', '.join(POLICIES)}."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another recording or trace of the same layers to compare.")
    ] = None,
    importance: Annotated[
        str, typer.Option(help="Of a trace, which has none: 'ones' or 'sampled' (invented).")
    ] = "ones",
    processes: Annotated[int | None, typer.Option(help="Worker processes for --policies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay recorded statistics and show the decisions.

    Without --set or --allocator the recording's own configuration is used and must repeat the
    run's decisions exactly. A recording without one gets ten events spread over its steps. With
    --against, the other recording is replayed likewise: by its own configuration, changed by the
    same settings.
    """
    opened = common.open_recording(recording, importance)  # type: ignore[arg-type]
    config = _config(opened, allocator, settings or [])
    result = replay(opened, config)
    own = config == opened.config and opened.policy in (config.policy, None)
    difference = first_difference(opened.events, result.events) if own else None
    others = _sweep(opened, config, policies, processes, progress=not as_json)
    other = None
    if against is not None:
        second = common.open_recording(against, importance)  # type: ignore[arg-type]
        other = replay(second, _config(second, allocator, settings or []))
    if as_json:
        common.emit(_data(opened, result, own, difference, others, other))
    else:
        _show(opened, result, own, difference, others, other)


def _config(opened: Recording, allocator: Path | None, settings: list[str]) -> AllocatorConfig:
    base: dict[str, Any] = ten_events(opened.steps)
    if opened.config is not None:
        base = opened.config.model_dump()
    return common.allocator(base, allocator, settings)


def ten_events(steps: int) -> dict[str, int]:
    """Ten events over the steps, after a tenth of them."""
    interval = max(1, (steps - steps // 10) // 10)
    return {
        "warmup_steps": max(0, steps - 10 * interval),
        "growth_interval": interval,
        "growth_end": steps,
    }


def _variant(config: AllocatorConfig, policy: str) -> AllocatorConfig:
    """Return the configuration with another policy, and ranks that it can start from."""
    values = config.model_dump() | {"policy": policy}
    if policy == "prune":
        values |= {"r_init": max(config.r_init, min(config.r_max, 2 * config.r_target))}
        values |= {"layer_ceiling": None}
    elif config.policy == "prune":
        values |= {"r_init": max(1, config.r_target // 2)}
    if policy == "uniform":
        values |= {"layer_ceiling": None}
    return AllocatorConfig(**values)


def _sweep(
    opened: Recording,
    config: AllocatorConfig,
    names: str | None,
    processes: int | None,
    progress: bool,
) -> Sweep | None:
    if names is None:
        return None
    chosen = list(POLICIES) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in POLICIES:
            raise DRLoRAError(f"--policies: no policy {name!r}; {near_misses(name, POLICIES)}")
    if names == "all" and opened.dimensions is None:
        chosen.remove("prune")  # needs rank dimensions, which only runs with prune record
    return sweep(
        opened, {name: _variant(config, name) for name in chosen}, processes, progress=progress
    )


def _rank_rows(result: Replay) -> list[dict[str, Any]]:
    return [
        {
            "layer": name,
            "mean": float(ranks.mean()),
            "smallest": int(ranks.min()),
            "largest": int(ranks.max()),
            "final ranks": " ".join(map(str, ranks.tolist()[:16]))
            + (" ..." if ranks.size > 16 else ""),
        }
        for name, ranks in result.final_ranks.items()
    ]


def _data(
    opened: Recording,
    result: Replay,
    own: bool,
    difference: str | None,
    others: Sweep | None,
    other: Replay | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "recording": {"steps": opened.steps, "layers": opened.layers, "notes": opened.notes},
        "caveat": CAVEAT,
        "config": result.config.model_dump(mode="json"),
        "own_configuration": own,
        "identical_to_recorded": (difference is None and bool(opened.events)) if own else None,
        "difference": difference,
        "events": [
            row | {"deltas": event.deltas, "ranks": event.ranks}
            for row, event in zip(event_rows(result), result.events, strict=True)
        ],
        "final_ranks": result.final_ranks,
        "diagnosis": diagnose(opened, result.config).to_dict(),
    }
    if others is not None:
        values["policies"] = others.rows()
    if other is not None:
        values["against"] = compare(result, other).to_dict()
    return values


def _show(
    opened: Recording,
    result: Replay,
    own: bool,
    difference: str | None,
    others: Sweep | None,
    other: Replay | None,
) -> None:
    for note in opened.notes:
        common.say(f"note: {note}")
    config = result.config
    common.say(
        f"{opened.steps} steps, {len(opened.layers)} layers, {opened.num_experts:,} experts; "
        f"policy {result.policy}, rank {config.starting_rank} to {config.r_target} (at most "
        f"{config.r_max}), events after steps {config.warmup_steps} to {config.growth_end} every "
        f"{config.growth_interval}"
    )
    common.table("Events", event_rows(result))
    rows = _rank_rows(result)
    note = f"{len(rows) - SHOWN_LAYERS} more layers; --json has all"
    common.table("Final ranks", rows[:SHOWN_LAYERS], note if len(rows) > SHOWN_LAYERS else None)
    if own and opened.config is not None:
        common.say(f"decisions identical to the recorded run: {'no' if difference else 'yes'}")
        if difference:
            common.say(f"first difference (recorded, replayed): {difference}")
    if others is not None:
        common.table("Policies on these statistics", others.rows())
    if other is not None:
        summary = compare(result, other).summary()
        rows = [{"measure": name, "mean over layers": value} for name, value in summary.items()]
        common.table("This recording (a) against the other (b)", rows)
    common.say(str(diagnose(opened, config)))
    common.say(CAVEAT)
