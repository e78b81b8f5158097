"""The conventions in the order they are tried."""

from __future__ import annotations

from torch import nn

from drlora_torch.models import interface, known_blocks  # noqa: F401  (it declares them)
from drlora_torch.models.convention import Convention
from drlora_torch.models.declaration import PerExpertLinears
from drlora_torch.models.identity_experts import IdentityExperts
from drlora_torch.models.refused import Refused
from drlora_torch.models.single_projections import SingleProjections
from drlora_torch.models.stacked import Stacked
from drlora_torch.models.undecorated import Undecorated
from drlora_torch.models.weighted_inputs import WeightedInputs

CONVENTIONS: tuple[Convention, ...] = (
    PerExpertLinears(),  # what a user declares goes first
    interface,
    Undecorated(),
    IdentityExperts(),
    Stacked(),
    WeightedInputs(),
    SingleProjections(),
    Refused(),
)


def convention_of(module: nn.Module) -> Convention | None:
    """Return the convention that a module follows; None if it is no layer of experts."""
    return next((c for c in CONVENTIONS if c.matches(module)), None)
