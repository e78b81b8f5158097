"""What :meth:`drlora_torch.Adapter.merge_and_save` tells of the checkpoint it wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class MergeReport:
    """A merged checkpoint, and what rounding has done to the update."""

    path: Path
    """Its folder."""
    storage: str
    """How its experts are stored, such as ``bfloat16`` or ``nf4``."""
    rounding: float
    """||written - (W + s B A)|| / ||s B A||, over all experts with an update; 0 without any.
    Above 1, rounding has changed the weights more than training has."""
    logits_error: float | None = None
    """||merged - adapted|| / ||adapted||, of the logits of a few random tokens; None where the
    merged model was not run."""
    logits_effect: float | None = None
    """||base - adapted|| / ||adapted||, to compare that with."""
