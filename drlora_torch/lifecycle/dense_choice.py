"""Which Linears get LoRA with ``attention_rank``, and why others are left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from drlora_torch.errors import AttachError
from drlora_torch.lifecycle.modules import find_modules
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter
from drlora_torch.models.records import MoELayer
from drlora_torch.models.sharding import is_spread
from drlora_torch.models.wrappers import peft_layers
from drlora_torch.options import AdapterOptions

logger = logging.getLogger(__name__)
QUANTIZED = {"Linear4bit", "LinearFP4", "LinearNF4", "Linear8bitLt", "FP8Linear"}
"""Classes of Linears whose own forward computes W x + b from a packed weight."""
HEADS = {"score", "classifier", "v_head", "qa_outputs"}
"""Usual names of the heads of classification, reward and question answering models."""
Reason = Callable[[str, nn.Module], str | None]
"""Why a module gets no LoRA, None if it does."""


def choose_linears(
    model: nn.Module,
    options: AdapterOptions,
    found: Iterable[MoELayer],
    modules_to_save: Collection[str] = (),
) -> dict[str, nn.Linear]:
    """Find the Linears that get LoRA, by qualified name; none without ``attention_rank``.

    Args:
        model: it is not changed.
        options: ``attention_rank`` and ``attention_targets``.
        found: all MoE layers of the model, adapted or not.
        modules_to_save: names of the modules that are trained whole.

    Raises:
        UnknownLayerError: there is no module of a target's name; the message lists near misses.
        AttachError: a target cannot be adapted, nothing is left to adapt, PEFT adapts a Linear
            already, or processes hold the model together.
    """
    if options.attention_rank is None:
        return {}
    if is_spread(model):
        raise AttachError(
            "attention_rank adds LoRA to Linears, and processes hold those of this model together "
            "already; wrong:\n    fully_shard(model), or DistributedConfig, then "
            "attach(..., attention_rank=...)\nright:\n    load the whole model in each process, "
            "attach, and then fully_shard(model) or DistributedDataParallel(model)"
        )
    reason = _reasons(model, options.attention_rank, list(found), modules_to_save)
    if options.attention_targets is None:
        chosen = _all_that_fit(model, reason)
        if not chosen:
            raise AttachError(
                f"attention_rank={options.attention_rank}, but the model has no Linear to adapt "
                "beside its routed experts, routers and heads whose smaller side is larger than "
                "that; leave it out, or choose a lower one"
            )
    else:
        chosen = {}
        for target in options.attention_targets:
            chosen |= _of_target(model, target, list(found), reason)
    for name, linear in chosen.items():
        _check(name, linear)
    return chosen


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All Linears of a model but PEFT's own; those in fewer bits are Linears too."""
    of_peft: set[int] = set()
    for layer in peft_layers(model):
        base = layer.get_base_layer().modules() if hasattr(layer, "get_base_layer") else ()
        of_peft |= {id(part) for part in layer.modules()} - {id(part) for part in base}
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear) and id(m) not in of_peft}


def _all_that_fit(model: nn.Module, reason: Reason) -> dict[str, nn.Linear]:
    """All Linears that get LoRA by default; the log says how many others do not, and why."""
    linears = _linears(model)
    indexers = list(_indexers(model))
    whys = {
        name: reason(name, linear)
        or ("it is in an indexer, which passes no gradient" if _is_inside(name, indexers) else None)
        for name, linear in linears.items()
    }
    left = Counter(why for why in whys.values() if why is not None)
    described = "; ".join(f"{count} ({why})" for why, count in left.items()) or "none"
    chosen = {name: linear for name, linear in linears.items() if whys[name] is None}
    logger.info("attention_rank adapts %d Linears and leaves out: %s", len(chosen), described)
    return chosen


def _of_target(
    model: nn.Module, target: str, found: list[MoELayer], reason: Reason
) -> dict[str, nn.Linear]:
    """The Linears that a name stands for.

    Routed experts, which have their own LoRA, and indexers count only where nothing else matches.
    """
    named = dict(model.named_modules())
    matching = {target: named[target]} if target in named else find_modules(model, target)
    aside = [*_experts(model, found), *_indexers(model)]
    inside = {name for name in matching if _is_inside(name, aside)}
    chosen: dict[str, nn.Linear] = {}
    for name, module in matching.items():
        if name in inside and len(inside) < len(matching):
            continue
        if (obstacle := reason(name, module)) is not None:
            raise AttachError(f"{name!r} of attention_targets cannot be adapted: {obstacle}")
        assert isinstance(module, nn.Linear)
        chosen[name] = module
    return chosen


def _reasons(
    model: nn.Module, rank: int, found: list[MoELayer], modules_to_save: Collection[str]
) -> Reason:
    """Make the function that says why a module of a model is left out."""
    places = {
        "it is in the routed experts, whose LoRA targets= and layers= choose": _experts(
            model, found
        ),
        "it is a router; router='trainable' trains it": list(_routers(model, found)),
        "modules_to_save trains it whole": modules_to_save,
    }
    heads = {id(head) for head in _heads(model)}
    outside = _outside_base(model)
    shared = _sharing(model)
    repeated = _repeated(model)

    def reason(name: str, module: nn.Module) -> str | None:
        for why, holders in places.items():
            if _is_inside(name, holders):
                return why
        if id(module) in heads:
            return "it is the output head; modules_to_save trains it whole"
        if id(module) in outside or HEADS.intersection(name.split(".")):
            return "it is a head beside the base model; modules_to_save trains it whole"
        if id(module) in shared:
            return "another module shares its weight"
        if id(module) in repeated:
            return "the model uses it at several places"
        return _unfit(module, rank)

    return reason


def _unfit(module: nn.Module, rank: int) -> str | None:
    """Why LoRA of a rank does not fit to a module, wherever it is."""
    if any(layer is module for layer in peft_layers(module)):
        return "PEFT adapts it already; leave it to one of the two"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, no Linear; name the Linears inside of it"
    if (side := min(module.in_features, module.out_features)) <= rank:
        return f"its smaller side, {side}, is not larger than attention_rank={rank}"
    return _unlike_linear(module)


def _unlike_linear(module: nn.Linear) -> str | None:
    """Why a Linear does not compute W x + b from a weight that it holds."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "torch's MultiheadAttention reads its weight without calling it"
    if type(module).forward is not nn.Linear.forward and type(module).__name__ not in QUANTIZED:
        return f"{type(module).__name__} has a forward of its own, which may not be W x + b"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (parametrized or pruned)"
    return None


def _check(name: str, linear: nn.Linear) -> None:
    """Refuse what a user has to decide, also where no target names it."""
    if name.endswith(".base_layer"):
        raise AttachError(
            f"PEFT adapts {name.removesuffix('.base_layer')!r} already; leave it to one of the "
            "two: name the others with attention_targets=, or leave out attention_rank"
        )
    if linear.weight.is_meta:
        raise AttachError(
            f"the weight of {name!r} is on the meta device; load the weights first, without "
            "offloading them (to CPU or disk)"
        )


def _experts(model: nn.Module, found: list[MoELayer]) -> list[str]:
    """Modules that hold nothing but routed experts; a layer may hold shared ones beside them."""
    names = []
    for layer in found:
        module = model.get_submodule(layer.name)
        inside: set[str] = set()
        for projection in layer.projections:  # none, if it cannot be adapted
            where = convention_of(module).location(module, projection)
            inside |= {where.module} if isinstance(where, ExpertParameter) else {*where.experts}
        names += [f"{layer.name}.{each}".strip(".") for each in inside or {""}]
    return names


def _routers(model: nn.Module, found: list[MoELayer]) -> Iterator[str]:
    """The routers, and where none is known, Linears beside the experts with an output for each."""
    for layer in found:
        parent = layer.name.rpartition(".")[0]
        if layer.router is not None:
            yield layer.router
            continue
        for name, module in model.get_submodule(parent).named_children():
            if getattr(module, "out_features", None) == layer.num_experts:
                yield f"{parent}.{name}".strip(".")


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The output heads of a model and of its parts, by what they say and by the usual name."""
    for module in model.modules():
        if isinstance(named := getattr(module, "lm_head", None), nn.Module):
            yield named
        get_head = getattr(module, "get_output_embeddings", None)
        try:
            head = None if get_head is None else get_head()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            yield head


def _outside_base(model: nn.Module) -> set[int]:
    """Linears of Transformers models beside their base model, by identity: heads of any name."""
    found: set[int] = set()
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", "")
        base = module._modules.get(prefix) if isinstance(prefix, str) else None
        if base is not None:
            inside = {id(part) for part in base.modules()}
            found |= {id(m) for m in module.modules() if isinstance(m, nn.Linear)} - inside
    return found


def _indexers(model: nn.Module) -> Iterator[str]:
    """Modules of sparse attention that choose tokens: their choice passes no gradient."""
    for name, module in model.named_modules():
        if "Indexer" in type(module).__name__:
            yield name


def _repeated(model: nn.Module) -> set[int]:
    """Modules that a model has under several names, by identity."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {module for module, count in names.items() if count > 1}


def _sharing(model: nn.Module) -> set[int]:
    """Modules that have a parameter in common with another one, by identity."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {id(module) for several in owners.values() if len(several) > 1 for module in several}


def _is_inside(name: str, holders: Iterable[str]) -> bool:
    return any(not holder or f"{name}.".startswith(f"{holder}.") for holder in holders)
