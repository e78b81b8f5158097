"""The conventions in the order they are tried."""

from __future__ import annotations

from torch import nn

from drlora_torch.models.convention import Convention
from drlora_torch.models.dbrx import DBRX
from drlora_torch.models.declaration import declaration_of
from drlora_torch.models.interface import INTERFACE
from drlora_torch.models.jetmoe import JETMOE, JETMOE_ATTENTION
from drlora_torch.models.llama4 import LLAMA4
from drlora_torch.models.longcat_flash import LONGCAT_FLASH
from drlora_torch.models.step3p7 import STEP3P7

BUILT_IN = (INTERFACE, STEP3P7, LONGCAT_FLASH, DBRX, LLAMA4, JETMOE, JETMOE_ATTENTION)


def find_convention(module: nn.Module) -> Convention | None:
    """Return the convention that a module follows; None if it is no layer of experts."""
    if (declared := declaration_of(module)) is not None:
        return declared  # first, since users may declare any class
    return next((each for each in BUILT_IN if each.matches(module)), None)


def convention_of(module: nn.Module) -> Convention:
    convention = find_convention(module)
    assert convention is not None, "only modules with a convention are adapted"
    return convention
