"""Recordings of the statistics of a run: written while it trains, replayed offline.

``engine.record_to(path)`` writes one; ``Recording.open(path)`` reads it; ``Recording.from_arrays``
and ``from_routing_trace`` build one from data of other origin. The format is in docs/recording.md.
"""

from drlora_core.recording.data import LayerRecord, Recording
from drlora_core.recording.traces import from_routing_trace, load_trace
from drlora_core.recording.writer import RecordingWriter

__all__ = ["LayerRecord", "Recording", "RecordingWriter", "from_routing_trace", "load_trace"]
