"""What a run will need: parameters, memory and growth timetable, computed from a model's shape.

The memory of the whole run is in :mod:`drlora_core.memory_forecast`; here is that of ways to store
the LoRA. A rank slot of a projection has a row of A [in] and a column of B [out]; a slot of an
expert has one of each of its projections.
"""

from __future__ import annotations

import dataclasses

from drlora_core.config import AllocatorConfig
from drlora_core.memory_forecast import (
    BYTES,
    DType,
    MemoryForecast,
    RunOptions,
    forecast,
    lora_parameters,
)
from drlora_core.model_shape import ModelShape
from drlora_core.timetable import moved_units


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """What one way of storing the LoRA takes, over all MoE layers."""

    name: str
    rank: int  # slots per expert, on average over a layer
    parameters: int
    weights: int  # bytes, as are the following
    gradients: int
    adam: int  # both moments; in PyTorch they have the dtype of the parameter
    total: int


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedEvent:
    """One event of one layer."""

    index: int
    step: int
    quota: int  # rank units placed (policy ``prune``: cut, negative)
    total: int  # total rank of the layer after the event
    mean: float  # mean rank of its experts after the event
    most_moved: int  # rank units that move between experts at most (policy ``move``)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs and when it grows."""

    shape: ModelShape
    config: AllocatorConfig
    dtype: DType
    expert_parameters: int  # of the frozen expert weights of all MoE layers
    storages: list[Storage]
    memory: MemoryForecast  # of the whole run
    peft_transient: int  # bytes that PEFT also builds per layer and forward: B A of every expert
    timetable: dict[int, list[PlannedEvent]]  # events of a layer, by its number of experts
    budget_met: dict[int, int | None]  # step after which a layer's budget is met; None: never


def make_plan(
    shape: ModelShape, config: AllocatorConfig, options: RunOptions | None = None
) -> Plan:
    """Compute the plan of a model under a configuration."""
    options = options or RunOptions()
    dtype = options.lora_dtype
    sizes = sorted({layer.num_experts for layer in shape.layers})
    frozen = [layer.expert_parameters for layer in shape.layers]
    return Plan(
        shape=shape,
        config=config,
        dtype=dtype,
        expert_parameters=sum(frozen),
        storages=storages(shape, config, dtype),
        memory=forecast(shape, config, options),
        peft_transient=BYTES[dtype] * max(frozen),
        timetable={size: planned_events(config, size) for size in sizes},
        budget_met={size: step_of_budget(config, size) for size in sizes},
    )


def storages(shape: ModelShape, config: AllocatorConfig, dtype: DType) -> list[Storage]:
    """Compare our layouts, uniform LoRA and PEFT; then the active ranks.

    PEFT's ``target_parameters`` stores A [N * r, in] and B [out, N * r], one r for all experts; an
    expert may only reach r_max there if all have it.
    """
    ranks = {
        "drlora, layout pooled": config.mean_rank_ceiling,
        "drlora, layout masked": config.r_max,
        "uniform LoRA at r_target": config.r_target,
        "PEFT target_parameters at r_target": config.r_target,
        "PEFT target_parameters at r_max": config.r_max,
        "active at the start": config.starting_rank,
        "active when the budget is met": config.r_target,
        "if every expert had r_max": config.r_max,
    }
    per_rank = lora_parameters(shape, 1)
    sizes = {name: per_rank * BYTES[dtype] * rank for name, rank in ranks.items()}
    return [
        Storage(name, ranks[name], per_rank * ranks[name], size, size, 2 * size, 4 * size)
        for name, size in sizes.items()
    ]


def planned_events(config: AllocatorConfig, num_experts: int) -> list[PlannedEvent]:
    """List the events of a layer of ``num_experts`` experts, if limits leave nothing unplaced.

    With scope ``global`` this is the layer's even share.
    """
    totals = [config.scheduled_total(num_experts, k) for k in range(config.num_events + 1)]
    share, events = config.move_share if config.policy == "move" else 0.0, config.num_events
    return [
        PlannedEvent(
            index=k,
            step=step,
            quota=totals[k] - totals[k - 1],
            total=totals[k],
            mean=totals[k] / num_experts,
            most_moved=moved_units(k, events, share, totals[k - 1]),
        )
        for k, step in enumerate(config.growth_steps, 1)
    ]


def step_of_budget(config: AllocatorConfig, num_experts: int) -> int | None:
    """Step after which the budget is met: 0 if from the start, None if never."""
    target = num_experts * config.r_target
    if config.starting_rank == config.r_target:
        return 0
    return next((e.step for e in planned_events(config, num_experts) if e.total == target), None)
