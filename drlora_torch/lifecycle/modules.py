"""Modules of the base that are trained whole beside the LoRA: new heads, embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from drlora_core.errors import UnknownLayerError, near_misses
from drlora_torch.errors import AttachError
from drlora_torch.models.records import MoELayer
from drlora_torch.models.wrappers import is_adapted_by_peft


def choose_modules(
    model: nn.Module, names: Sequence[str] | None, records: Iterable[MoELayer]
) -> dict[str, nn.Module]:
    """Find the modules of ``modules_to_save``, by qualified name, as PEFT does.

    A name stands for every module of that name and every one whose name ends with it:
    ``score``, ``model.embed_tokens``.

    Raises:
        UnknownLayerError: there is no such module; the message lists near misses.
        AttachError: a module has no parameters, or holds adapted experts.
    """
    chosen: dict[str, nn.Module] = {}
    for wanted in names or ():
        chosen |= find_modules(model, wanted)
    for name, module in chosen.items():
        _check_kind(name, module)
        for record in records:
            if f"{record.name}.".startswith(f"{name}.") or name.startswith(f"{record.name}."):
                raise AttachError(
                    f"module {name!r} of modules_to_save holds the adapted experts of "
                    f"{record.name!r} or is a part of them; leave it out, or leave that layer out "
                    "with layers=..."
                )
    return {n: m for n, m in chosen.items() if not _inside(n, chosen)}


def find_modules(model: nn.Module, wanted: str) -> dict[str, nn.Module]:
    """Every module of this name, and every one whose name ends with it, by qualified name.

    Raises:
        UnknownLayerError: there is none; the message lists near misses.
    """
    known = {name: module for name, module in model.named_modules() if name}
    found = {n: m for n, m in known.items() if n == wanted or n.endswith(f".{wanted}")}
    if not found:
        ends = {n.rpartition(".")[2] for n in known}
        raise UnknownLayerError(f"no module {wanted!r}; {near_misses(wanted, sorted(ends))}")
    return found


def _check_kind(name: str, module: nn.Module) -> None:
    if not any(True for _ in module.parameters()):
        raise AttachError(f"module {name!r} of modules_to_save has no parameters")
    if is_adapted_by_peft(module):
        raise AttachError(
            f"PEFT adapts or trains module {name!r} of modules_to_save already; leave it to one of "
            "the two"
        )
    kept = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    if buffers := sorted(module.state_dict().keys() - kept):
        raise AttachError(
            f"module {name!r} of modules_to_save has buffers ({buffers[0]!r}), such as running "
            "averages, which would be lost: only parameters are trained and saved"
        )


def _inside(name: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in names)
