"""The whole plan, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from drlora_core.config import AllocatorConfig
from drlora_core.plan.model_shape import ModelShape
from drlora_core.plan.sizes import DType, Storage, peft_transient, slot_parameters, storages
from drlora_core.plan.timetable import PlannedEvent, planned_events, step_of_budget


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs and when it grows."""

    shape: ModelShape
    config: AllocatorConfig
    dtype: DType
    slot_parameters: int
    """LoRA parameters of one rank of one expert."""
    storages: list[Storage]
    peft_transient: int
    """Bytes that PEFT builds per layer and forward on top."""
    timetable: dict[int, list[PlannedEvent]]
    """Events of a layer, by its number of experts."""
    budget_met: dict[int, int | None]
    """Step after which a layer's budget is met, by its number of experts; None: never."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": dataclasses.asdict(self.shape)
            | {
                "moe_layers": len(self.shape.experts),
                "projections": {n: list(size) for n, size in self.shape.projections().items()},
                "expert_parameters": self.shape.expert_parameters(),
            },
            "config": self.config.model_dump(mode="json"),
            "dtype": self.dtype,
            "slot_parameters": self.slot_parameters,
            "storages": [dataclasses.asdict(way) | {"total": way.total} for way in self.storages],
            "peft_transient": self.peft_transient,
            "timetable": {
                size: [dataclasses.asdict(event) for event in events]
                for size, events in self.timetable.items()
            },
            "budget_met": self.budget_met,
        }


def make_plan(shape: ModelShape, config: AllocatorConfig, dtype: DType = "float32") -> Plan:
    """Work out a plan."""
    sizes = sorted(set(shape.experts.values()))
    return Plan(
        shape=shape,
        config=config,
        dtype=dtype,
        slot_parameters=slot_parameters(shape),
        storages=storages(shape, config, dtype),
        peft_transient=peft_transient(shape, dtype),
        timetable={size: planned_events(config, size) for size in sizes},
        budget_met={size: step_of_budget(config, size) for size in sizes},
    )
