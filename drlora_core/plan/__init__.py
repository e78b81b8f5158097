"""What a run will need, from a model's config.json alone: layers, parameters, memory, timetable."""

from drlora_core.plan.model_shape import ModelShape, read_model_config
from drlora_core.plan.plan import Plan, make_plan
from drlora_core.plan.sizes import Storage, storages
from drlora_core.plan.timetable import PlannedEvent, planned_events

__all__ = [
    "ModelShape",
    "Plan",
    "PlannedEvent",
    "Storage",
    "make_plan",
    "planned_events",
    "read_model_config",
    "storages",
]
