"""A run as it is looked at afterwards: what was recorded, what was decided, how the loss went."""

from drlora_core.runs.folder import find_recording
from drlora_core.runs.metrics import Losses
from drlora_core.runs.opening import open_run, ten_events
from drlora_core.runs.run import Drawable, Run, as_run, from_recording, tell_apart

__all__ = [
    "Drawable",
    "Losses",
    "Run",
    "as_run",
    "find_recording",
    "from_recording",
    "open_run",
    "tell_apart",
    "ten_events",
]
