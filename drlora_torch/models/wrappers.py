"""Modules around a model: PEFT's, a compiled one, and those that train it in several processes.

Their libraries are never imported here: a wrapper exists only where its library has been imported.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from drlora_torch.errors import AttachError
from drlora_torch.models import frameworks

COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
DDP = ("torch.nn.parallel.distributed", "DistributedDataParallel")
FSDP = ("torch.distributed.fsdp", "FullyShardedDataParallel")
DATA_PARALLEL = ("torch.nn.parallel.data_parallel", "DataParallel")
DEEPSPEED = ("deepspeed.runtime.engine", "DeepSpeedEngine")
MEGATRON = ("megatron.core.distributed.data_parallel_base", "_BaseDataParallel")
STAGE = ("torch.distributed.pipelining.stage", "_PipelineStageBase")
PIPE = ("torch.distributed.pipelining._IR", "Pipe")
ACTIVATIONS = (
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "ActivationWrapper",
)
PEFT = (("peft", "PeftModel"), ("peft", "PeftMixedModel"))
INSIDE = {
    COMPILED: "_orig_mod",
    DDP: "module",
    FSDP: "module",
    DATA_PARALLEL: "module",
    DEEPSPEED: "module",
    MEGATRON: "module",
}
"""Wrappers of whole models, and the attribute that holds the model."""

RIGHT = "attach(model, engine) first, then DistributedDataParallel(model)"
REFUSED = {
    DDP: (
        "it would not synchronize parameters that are added now, and the processes would train "
        f"apart; wrong:\n    attach(DistributedDataParallel(model), engine)\nright:\n    {RIGHT}"
    ),
    FSDP: (
        "it has flattened the parameters of the experts; wrong:\n"
        f"    attach(FullyShardedDataParallel(model), engine)\nright:\n    {RIGHT}"
    ),
    DATA_PARALLEL: (
        "it runs copies of the model, whose statistics would be lost; wrong:\n"
        "    attach(DataParallel(model), engine)\nright, with one process for each GPU:\n"
        f"    {RIGHT}"
    ),
    DEEPSPEED: (
        "it would not train what is added now; "
        + frameworks.RIGHT.format(wrong="attach(deepspeed.initialize(...)[0], engine)")
    ),
    MEGATRON: f"it {frameworks.MEGATRON}",
    STAGE: f"it {frameworks.PIPELINE}",
    PIPE: f"it {frameworks.PIPELINE}",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers: layers have the same names with and without them."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def check_wrappers(model: nn.Module) -> None:
    """Refuse to adapt a model through a wrapper that would not train what is added now."""
    inner: nn.Module | None = model
    while inner is not None:
        model = inner
        for kind, reason in REFUSED.items():
            if _is(model, kind):
                raise AttachError(
                    f"the model is wrapped in {type(model).__name__} already: {reason}"
                )
        inner = _inside(model)
    if isinstance(model, nn.Module):
        frameworks.check_new(model)


def check_parts(model: nn.Module, layer: str) -> None:
    """Refuse a layer inside a wrapped part of the model: seeds and files go by the layer's name."""
    module, path = model, ""
    for child in layer.split("."):
        module, path = module.get_submodule(child), f"{path}.{child}".removeprefix(".")
        for kind in (*INSIDE, ACTIVATIONS):
            if _is(module, kind):
                hint = ", or compile it in place: part.compile()" if kind == COMPILED else ""
                raise AttachError(
                    f"part {path!r} of the model is wrapped ({type(module).__name__}), which "
                    f"renames its layers; call attach first and wrap it then{hint}"
                )


def is_adapted_by_peft(model: nn.Module) -> bool:
    """True if PEFT has put layers of its own into a model; it has then frozen all others."""
    return next(peft_layers(model), None) is not None


def peft_models(model: nn.Module) -> list[nn.Module]:
    """The PeftModels among the wrappers of a model, from the outside."""
    found = [model] if any(_is(model, kind) for kind in PEFT) else []
    inner = _inside(model)
    return found if inner is None else [*found, *peft_models(inner)]


def is_peft_model(model: nn.Module) -> bool:
    """True for a PeftModel, whatever is around it."""
    return bool(peft_models(model))


@contextlib.contextmanager
def without_peft(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's adapters of a model are switched off, as in ``PeftModel.disable_adapter``."""
    switched = [layer for layer in peft_layers(model) if not layer.disable_adapters]
    before = [(p, p.requires_grad) for layer in switched for p in layer.parameters()]
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
        for parameter, required in before:  # enable_adapters lets all that is active learn
            parameter.requires_grad_(required)


def peft_layers(model: nn.Module) -> Iterator[Any]:
    """The layers that PEFT has put into a model, and its wrappers of modules trained whole."""
    kinds = (
        ("peft.tuners.tuners_utils", "BaseTunerLayer"),
        ("peft.utils.other", "AuxiliaryTrainingWrapper"),  # modules_to_save
    )
    if "peft" in sys.modules:
        yield from (m for m in model.modules() if any(_is(m, kind) for kind in kinds))


def _inside(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper of whole models holds; None for others."""
    found: Any = None
    for kind, attribute in INSIDE.items():
        if _is(model, kind):
            found = getattr(model, attribute)
    if any(_is(model, kind) for kind in PEFT):
        found = model.get_base_model()  # type: ignore[operator]
    return found if isinstance(found, nn.Module) else None


def _is(module: nn.Module, kind: tuple[str, str]) -> bool:
    """True for an instance of a class, given by the names of its library and its own."""
    library = sys.modules.get(kind[0])
    return isinstance(module, getattr(library, kind[1], ()))
