"""Frameworks that would train an adapter wrongly, or not at all, without a word.

They are known by the names of their classes, by what they leave on parameters, and by what they run
the model from. They are never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import nn

from drlora_torch.errors import AttachError

RIGHT = (
    "train with DistributedDataParallel or fully_shard, made after attach; wrong:\n"
    "    {wrong}\n"
    "right:\n"
    "    adapter = attach(model, engine)\n"
    "    parallel = DistributedDataParallel(model)"
)
DEEPSPEED = (
    "steps copies of the weights, so drlora would see no step (only ZeRO stage 0 without fp16 and "
    "bf16 steps the weights themselves, and works); "
    + RIGHT.format(wrong="deepspeed.initialize(model=model, ...)  # ZeRO, fp16 or bf16")
)
MEGATRON = (
    "keeps the gradients in buffers of its own (main_grad), so drlora would read none; "
    + RIGHT.format(wrong="megatron.core.distributed.DistributedDataParallel(config, ..., model)")
)
PIPELINE = (
    "gives each process some of the layers, and drlora sums statistics of the same layers in every "
    "process; " + RIGHT.format(wrong="PipelineStage(part_of_the_model, ...)")
)
JOIN = (
    "the model runs inside DistributedDataParallel.join(), where processes may take unequal "
    "numbers of steps, and drlora sums statistics over all of them in each step, which would hang "
    "or fail; take as many steps on every process (drop_last=True, or stop all at the smallest "
    "count), with a new wrapper: torch leaves one in this mode after join(); wrong:\n"
    "    with parallel.join():\n"
    "        train(parallel, loader)\n"
    "right:\n"
    "    loader = DataLoader(data, sampler=DistributedSampler(data, drop_last=True), "
    "drop_last=True)\n"
    "    train(DistributedDataParallel(model), loader)"
)
FUNCTIONAL = (
    "the model runs with other tensors in the place of the LoRA's parameters "
    "(torch.func.functional_call), whose gradients drlora would not see; call the model itself, or "
    "run this inside adapter.paused() or torch.no_grad(), where nothing is counted"
)
MARKS = {
    "ds_id": f"DeepSpeed (ZeRO-3) holds the parameters: it {DEEPSPEED}",
    "_hp_mapping": f"DeepSpeed (ZeRO) holds the parameters: it {DEEPSPEED}",
    "main_grad": f"Megatron's data parallelism holds the parameters: it {MEGATRON}",
}
"""Attributes of parameters, and what they tell."""
PIPELINES = (
    "torch.distributed.pipelining",
    "deepspeed.runtime.pipe",
    "megatron.core.pipeline_parallel",
)
WATCHED = (
    "torch.nn.parallel.distributed",
    "deepspeed.",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    *PIPELINES,
)


def check_training(lora: nn.Module) -> None:
    """Refuse a forward that is to be trained, if a framework runs it that would not train it.

    Raises:
        AttachError: DeepSpeed with an optimizer of its own, Megatron, a pipeline, ``join()``, or
            ``functional_call``.
    """
    if not isinstance(next(lora.parameters()), nn.Parameter):
        raise AttachError(FUNCTIONAL)
    check_marks(lora.parameters())
    check_running()


def check_marks(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse parameters that a framework has taken over."""
    for parameter in parameters:
        for mark, reason in MARKS.items():
            if hasattr(parameter, mark):
                raise AttachError(reason)


def check_new(model: nn.Module) -> None:
    """Refuse to adapt a model that a framework trains already: it would not know the LoRA."""
    check_marks(model.parameters())
    for hook in model._forward_pre_hooks.values():
        if str(getattr(hook, "__module__", "")).startswith("deepspeed."):
            raise AttachError(
                "deepspeed.initialize was called on the model before attach, and its engine would "
                "not train what is added now; " + RIGHT.format(wrong="deepspeed.initialize(...)")
            )


def check_running() -> None:
    """Refuse what calls this function, directly or not."""
    for library, runner in _running(sys._getframe(1)):
        if library == "torch.nn.parallel.distributed":
            if getattr(getattr(runner, "_join_config", None), "enable", False):
                raise AttachError(JOIN)
        elif library.startswith(PIPELINES):
            raise AttachError(f"the model runs in a pipeline ({library}), which {PIPELINE}")
        elif library.startswith("deepspeed."):
            check_optimizer(runner)
            check_optimizer(getattr(runner, "optimizer", None))
        else:
            raise AttachError(f"Megatron trains the model ({library}): it {MEGATRON}")


def check_optimizer(optimizer: object) -> None:
    """Refuse an optimizer of DeepSpeed that steps copies of the parameters.

    Args:
        optimizer: any, also inside the wrapper that Accelerate makes.
    """
    for each in (optimizer, getattr(optimizer, "optimizer", None)):
        for kind in type(each).__mro__:
            if kind.__name__ == "DeepSpeedOptimizer" and kind.__module__.startswith("deepspeed."):
                raise AttachError(
                    f"DeepSpeed steps the model with its {type(each).__name__}: it {DEEPSPEED}"
                )


def _running(frame: FrameType | None) -> Iterator[tuple[str, object]]:
    """The watched modules that code is running in, each with the ``self`` of its method."""
    while frame is not None:
        library = str(frame.f_globals.get("__name__"))
        if library.startswith(WATCHED):
            yield library, frame.f_locals.get("self")
        frame = frame.f_back
