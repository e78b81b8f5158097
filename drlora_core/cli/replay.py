"""``drlora replay``: decisions of policies on recorded statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from drlora_core.cli import common
from drlora_core.cli.console import say
from drlora_core.cli.tables import header, show_table
from drlora_core.comparison import compare
from drlora_core.config import AllocatorConfig, PolicyName
from drlora_core.diagnostics import diagnose
from drlora_core.errors import DRLoRAError, near_misses
from drlora_core.recording import Recording
from drlora_core.replay import CAVEAT, Replay, first_difference, repeats_run, replay, why_no_cuts
from drlora_core.report import event_rows
from drlora_core.runs import ten_events
from drlora_core.sweep import sweep

POLICIES: tuple[str, ...] = get_args(PolicyName)
SHOWN_LAYERS = 8


def replay_command(
    recording: Annotated[
        Path,
        typer.Argument(
            metavar="RECORDING",
            help="A recording, a run's directory with one, or a routing trace: an .npz file with "
            "arrays weight_sum [steps, layers, experts] and tokens [steps].",
        ),
    ],
    settings: common.Settings = None,
    allocator: common.ConfigFile = None,
    policies: Annotated[
        str | None,
        typer.Option(help=f"Compare policies: 'all' or names of {', '.join(POLICIES)}."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another recording or trace of the same layers to compare.")
    ] = None,
    importance: Annotated[
        str, typer.Option(help="A trace has no importance: use 'ones' or 'sampled' (invented).")
    ] = "ones",
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Worker processes for --policies.")
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Replay a recording and show the decisions.

    Without --set or --allocator the recording's own configuration is used and must repeat the
    run's decisions exactly. A recording without one gets ten events spread over its steps. With
    --against, the other recording is replayed too: by its own configuration, changed by the same
    settings.
    """
    opened = common.open_recording(recording, importance)
    config = _read_config(opened, allocator, settings)
    result = replay(opened, config)
    diagnosis = diagnose(opened, config)
    values = _describe(opened, result) | {"diagnosis": diagnosis.to_dict()}
    if policies is not None:
        configs, left_out = _vary_policy(opened, config, policies)
        values["policies_left_out"] = left_out
        values["policies"] = sweep(opened, configs, processes, progress=not as_json).rows()
    if against is not None:
        second = common.open_recording(against, importance)
        other = replay(second, _read_config(second, allocator, settings))
        values["against"] = compare(result, other).to_dict()
    if as_json:
        common.emit(values)
    else:
        _show(opened, result, values)
        say(f"{diagnosis}\n{CAVEAT}")


def _read_config(
    opened: Recording, allocator: Path | None, settings: list[str] | None
) -> AllocatorConfig:
    own = opened.config
    base = ten_events(opened.steps) if own is None else own.model_dump()
    return common.build_config(base, allocator, settings)


def _vary_policy(
    opened: Recording, config: AllocatorConfig, names: str
) -> tuple[dict[str, AllocatorConfig], dict[str, str]]:
    """Return the configuration with each policy, and why some of 'all' are left out.

    Ranks and scope are such that the policy can start from them.
    """
    chosen = list(POLICIES) if names == "all" else [name.strip() for name in names.split(",")]
    configs, left_out = {}, {}
    for name in chosen:
        if name not in POLICIES:
            raise DRLoRAError(f"--policies: no policy {name!r}; {near_misses(name, POLICIES)}")
        values = config.model_dump() | {"policy": name}
        if name == "prune":
            values["r_init"] = max(config.r_init, min(config.r_max, 2 * config.r_target))
        elif config.policy == "prune":
            values["r_init"] = max(1, config.r_target // 2)
        if name in ("prune", "move", "uniform"):
            values["layer_ceiling"] = None
        if name == "move":
            values["scope"] = "layer"
        wanted = AllocatorConfig(**values)
        if wanted.cuts and (reason := why_no_cuts(opened, wanted)):
            if names != "all":
                raise DRLoRAError(f"--policies {names}: {reason}")
            left_out[name] = reason
        else:
            configs[name] = wanted
    return configs, left_out


def _describe(opened: Recording, result: Replay) -> dict[str, Any]:
    own = repeats_run(opened, result)
    difference = first_difference(opened.events, result.events) if own else None
    return {
        "recording": {"steps": opened.steps, "layers": opened.layers, "notes": opened.notes},
        "caveat": CAVEAT,
        "config": result.config.model_dump(mode="json"),
        "own_configuration": own,
        "identical_to_recorded": difference is None and bool(opened.events) if own else None,
        "difference": difference,
        "events": [
            row | {"deltas": event.deltas, "ranks": event.ranks}
            for row, event in zip(event_rows(result), result.events, strict=True)
        ],
        "final_ranks": result.final_ranks,
    }


def _show(opened: Recording, result: Replay, values: dict[str, Any]) -> None:
    for note in opened.notes:
        say(f"note: {note}")
    config, start = result.config, int(result.total_rank()[0]) / opened.num_experts
    say(
        f"{opened.steps} steps, {len(opened.layers)} layers, {opened.num_experts:,} experts; "
        f"policy {result.policy}, mean rank {start:g} to {config.r_target} (at most "
        f"{config.r_max}), events after steps {config.warmup_steps} to {config.growth_end} every "
        f"{config.growth_interval}"
    )
    show_table("Events", event_rows(result), spare=("event",))
    rows = _rank_rows(result)
    note = f"{len(rows) - SHOWN_LAYERS} more layers; --json has all"
    show_table(
        "Final ranks",
        rows[:SHOWN_LAYERS],
        note if len(rows) > SHOWN_LAYERS else None,
        spare=("smallest", "largest"),
    )
    if values["own_configuration"]:
        difference = values["difference"]
        say(f"decisions identical to the recorded run: {'no' if difference else 'yes'}")
        if difference:
            say(f"first difference (recorded, replayed): {difference}")
    spare = ("unplaced", "configuration", "largest", "entropy", "events")
    show_table("Policies on these statistics", values.get("policies", []), spare=spare)
    for name, reason in values.get("policies_left_out", {}).items():
        say(f"policy {name} is left out: {reason}")
    if "against" in values:
        summary = values["against"]["summary"].items()
        rows = [{"measure": header(name), "mean over layers": value} for name, value in summary]
        show_table("This recording (a) against the other (b)", rows)


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
