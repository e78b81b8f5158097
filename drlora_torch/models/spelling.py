"""How a PEFT directory spells the names of Linears, so that a reader finds them again.

PEFT passes the keys of an adapter through the renamings with which Transformers reads the model's
checkpoints. Some of these change names that are the model's own already: ``mlp.shared_expert.``, a
regular expression, matches ``mlp.shared_experts`` too. Such names are written as checkpoints have
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key

from drlora_torch.models.checkpoint_names import revert_names
from drlora_torch.models.wrappers import unwrapped

Rename = Callable[[str], str]


def spellings(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """How a directory spells Linears, by their names in the model without wrappers.

    None where PEFT finds a Linear under no name.
    """
    found: dict[str, str | None] = {name: name for name in names}
    model = unwrapped(model)
    rename = _renaming(model)
    if rename is None:
        return found
    lost = [name for name in found if not _finds(rename, name, name)]
    for name, spelled in revert_names(model, lost).items():
        found[name] = spelled if _finds(rename, spelled, name) else None
    return found


def _renaming(model: nn.Module) -> Rename | None:
    """What PEFT makes of a name, None if it takes all names as they are."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or get_checkpoint_conversion_mapping(kind) is None:
        return None
    known = get_model_conversion_mapping(model)
    renamings = [each for each in known if isinstance(each, WeightRenaming)]
    return lambda name: rename_source_key(f"{name}.lora_A.weight", renamings, [])[0]


def _finds(rename: Rename, spelled: str, name: str) -> bool:
    """True if PEFT takes a name for that of a Linear; a prefix that is lost, it adds again."""
    return f"{name}.lora_A.weight".endswith(rename(spelled))
