"""The ways to spread a model over processes that are compared with one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.parity import training
from benchmarks.parity.training import Model, Recipe, Trace

Spread = Callable[[Path, Recipe, int], Trace]
"""From the folder of the model, a recipe and a number of steps to what a process saw."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to spread a model, and how it is trained."""

    group: str
    name: str
    spread: Spread
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    worlds: tuple[int, ...] = (2, 4)
    fast: bool = False
    """Whether it is in the first tests, with two processes."""


def rows_of(batches: int, copies: int = 1) -> slice:
    """The rows of this process, if ``copies`` neighbors train on the same ones."""
    share = training.ROWS // batches
    first = distributed.get_rank() // copies * share
    return slice(first, first + share)


def _ddp(folder: Path, recipe: Recipe, steps: int) -> Trace:
    """Each adapter in turn, in a wrapper of its own: it takes what learns when it is made."""
    model = training.build_model()
    adapters = training.attach_all(model, recipe, steps)
    trace = Trace()
    for adapter in adapters:
        adapter.activate()
        parallel = DistributedDataParallel(model)
        sync = functools.partial(training.without_sync, parallel)
        rows = rows_of(distributed.get_world_size())
        mean = training.mean_over_processes
        _extend(
            trace,
            training.train(parallel, adapter, recipe, rows, range(steps), sync=sync, whole=mean),
        )
    return trace


def _extend(trace: Trace, other: Trace) -> None:
    for field in dataclasses.fields(Trace):
        setattr(trace, field.name, getattr(trace, field.name) + getattr(other, field.name))


def run_alone(recipe: Recipe, steps: int, group: Any) -> Trace:
    """Train in one process, on the whole batch; ``group`` holds it alone."""
    model = training.build_model()
    trace = Trace()
    for adapter in training.attach_all(model, recipe, steps, group):
        adapter.activate()
        _extend(trace, training.train(model, adapter, recipe, slice(None), range(steps)))
    return trace


def shard(
    model: Model, *, whole: bool = False, replicas: int = 1, copies: int = 1, **options: Any
) -> Model:
    """Shard every decoder layer and the model, or the model alone.

    Args:
        model: sharded in place.
        whole: the model alone.
        replicas: how many hold the same shard, and train on different batches.
        copies: how many processes share a batch, as in tensor parallelism by others.
        options: of ``fully_shard``.
    """
    size = distributed.get_world_size() // replicas // copies
    names = ("replicate", "shard", "copies")
    mesh = init_device_mesh("cpu", (replicas, size, copies), mesh_dim_names=names)
    mesh = mesh["replicate", "shard"] if replicas > 1 else mesh["shard"]
    for layer in () if whole else model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _fsdp(
    folder: Path,
    recipe: Recipe,
    steps: int,
    *,
    first: bool = True,
    copies: int = 1,
    divide: float | None = None,
    **options: Any,
) -> Trace:
    """``fully_shard`` after ``attach`` (``first``) or before."""
    model = training.build_model()
    if not first:
        shard(model, copies=copies, **options)
    (adapter,) = training.attach_all(model, recipe, steps)
    if first:
        shard(model, copies=copies, **options)
    world = distributed.get_world_size()
    if divide is not None:  # each process then has its share of the loss of all
        recipe = dataclasses.replace(recipe, share=1.0 / world)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(divide)
                module.set_force_sum_reduction_for_comms(True)
    sync = functools.partial(training.without_reduction, model)
    rows = rows_of(world // copies, copies)
    mean = training.mean_over_processes
    return training.train(model, adapter, recipe, rows, range(steps), sync=sync, whole=mean)


def load_spread(
    folder: Path, sizes: Mapping[str, int], *, split_experts: bool = True
) -> tuple[Model, slice]:
    """Load a model as Transformers spreads it; also the rows that this process trains on.

    Some families have no plan for their experts under tensor parallelism (``split_experts``).
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**sizes)
    base = AutoConfig.from_pretrained(folder)
    if not split_experts:
        plan = base.base_model_tp_plan
        base.base_model_tp_plan = {k: style for k, style in plan.items() if "experts" not in k}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=base,
        dtype=torch.float64,
        experts_implementation="eager",
        distributed_config=config,
    )
    copies = distributed.get_world_size() // config.dp_size
    return model.train(), rows_of(config.dp_size, copies)


def _transformers(
    folder: Path, recipe: Recipe, steps: int, *, split_experts: bool = True, **sizes: int
) -> Trace:
    model, rows = load_spread(folder, sizes, split_experts=split_experts)
    (adapter,) = training.attach_all(model, recipe, steps)
    return training.train(
        model, adapter, recipe, rows, range(steps), whole=training.mean_over_processes
    )


def _after(**options: Any) -> Spread:
    return functools.partial(_fsdp, **options)


def _before(**options: Any) -> Spread:
    return functools.partial(_fsdp, first=False, **options)


def _by_transformers(**sizes: Any) -> Spread:
    return functools.partial(_transformers, **sizes)


LATE = Recipe(attach={"router": "after_warmup"})
ROUTERS = Recipe(attach={"router": "trainable"})
ACCUMULATED = Recipe(micro=2)
PRUNE = Recipe(config=training.PRUNED)
BY_HAND = Recipe(attach={"auto_step": False}, micro=2)
MASKED = Recipe(attach={"layout": "masked"})
HEAD = Recipe(attach={"modules_to_save": ["lm_head"]})
CLIPPED = Recipe(clip=True)
STATIC = Recipe(config={"r_init": 1, "r_target": 1})
DDP, AFTER = "DistributedDataParallel", "`fully_shard` after `attach`"
BEFORE, BY = "`fully_shard` before `attach`", "Transformers' `DistributedConfig`"

MODES = (
    Mode(group=DDP, name="plain", spread=_ddp),
    Mode(group=DDP, name="accumulation with no_sync", spread=_ddp, recipe=ACCUMULATED),
    Mode(group=DDP, name="auto_step=False", spread=_ddp, recipe=BY_HAND),
    Mode(
        group=DDP,
        name="auto_step=False, reentrant checkpointing",
        spread=_ddp,
        recipe=dataclasses.replace(BY_HAND, checkpointing=True),
        fast=True,
    ),
    Mode(group=DDP, name="router=after_warmup", spread=_ddp, recipe=LATE, fast=True),
    Mode(group=DDP, name="router=trainable", spread=_ddp, recipe=ROUTERS),
    Mode(group=DDP, name="modules_to_save", spread=_ddp, recipe=HEAD),
    Mode(group=DDP, name="GradScaler", spread=_ddp, recipe=Recipe(scaler=True), fast=True),
    Mode(group=DDP, name="prune", spread=_ddp, recipe=PRUNE),
    Mode(group=DDP, name="masked", spread=_ddp, recipe=MASKED),
    Mode(group=DDP, name="two adapters", spread=_ddp, recipe=Recipe(names=("first", "second"))),
    Mode(group=AFTER, name="plain", spread=_after()),
    Mode(
        group=AFTER,
        name="reshard_after_forward=False",
        spread=_after(reshard_after_forward=False),
        recipe=ACCUMULATED,
        fast=True,
    ),
    Mode(group=AFTER, name="root alone", spread=_after(whole=True), recipe=ACCUMULATED),
    Mode(
        group=AFTER,
        name="CPU offload",
        spread=_after(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    ),
    Mode(group=AFTER, name="accumulation", spread=_after(), recipe=ACCUMULATED),
    Mode(group=AFTER, name="auto_step=False", spread=_after(), recipe=BY_HAND, fast=True),
    Mode(
        group=AFTER,
        name="router=after_warmup, clipping",
        spread=_after(),
        recipe=dataclasses.replace(LATE, clip=True),
        fast=True,
    ),
    Mode(group=AFTER, name="modules_to_save", spread=_after(), recipe=HEAD),
    Mode(group=AFTER, name="prune", spread=_after(), recipe=PRUNE),
    Mode(group=AFTER, name="masked", spread=_after(), recipe=MASKED),
    Mode(group=AFTER, name="uneven shards", spread=_after(), worlds=(3, 5)),
    Mode(group=AFTER, name="replicas (HSDP)", spread=_after(replicas=2), worlds=(4,)),
    Mode(group=AFTER, name="two processes a batch", spread=_after(copies=2), worlds=(4,)),
    Mode(group=AFTER, name="clipping", spread=_after(), recipe=CLIPPED, fast=True),
    Mode(
        group=AFTER,
        name="activation checkpointing",
        spread=_after(),
        recipe=Recipe(checkpointing=False),
    ),
    Mode(
        group=AFTER,
        name="reentrant checkpointing",
        spread=_after(),
        recipe=Recipe(checkpointing=True),
    ),
    Mode(
        group=AFTER,
        name="auto_step=False, reentrant checkpointing",
        spread=_after(),
        recipe=dataclasses.replace(BY_HAND, checkpointing=True),
    ),
    Mode(group=AFTER, name="a process without rows", spread=_after(), recipe=STATIC, worlds=(5,)),
    Mode(group=BEFORE, name="plain", spread=_before()),
    Mode(group=BEFORE, name="accumulation", spread=_before(), recipe=ACCUMULATED),
    Mode(group=BEFORE, name="auto_step=False", spread=_before(), recipe=BY_HAND),
    Mode(group=BEFORE, name="router=after_warmup", spread=_before(), recipe=LATE, fast=True),
    Mode(group=BEFORE, name="prune", spread=_before(), recipe=PRUNE),
    Mode(group=BEFORE, name="clipping", spread=_before(), recipe=CLIPPED),
    Mode(group=BEFORE, name="a sum over processes", spread=_before(divide=1.0), worlds=(2,)),
    Mode(group=BEFORE, name="uneven shards", spread=_before(), worlds=(3, 5)),
    Mode(group=BEFORE, name="replicas (HSDP)", spread=_before(replicas=2), worlds=(4,)),
    Mode(
        group=BEFORE,
        name="activation checkpointing",
        spread=_before(),
        recipe=Recipe(checkpointing=False),
    ),
    Mode(group=BY, name="fsdp", spread=_by_transformers(fsdp_size=2), worlds=(2,), fast=True),
    Mode(group=BY, name="tp", spread=_by_transformers(tp_size=2), worlds=(2,), fast=True),
    Mode(
        group=BY,
        name="ep + fsdp",
        spread=_by_transformers(fsdp_size=2, ep_size=2),
        worlds=(2,),
        fast=True,
    ),
    Mode(
        group=BY,
        name="ep + tp",
        spread=_by_transformers(tp_size=2, ep_size=2),
        worlds=(2,),
        fast=True,
    ),
    *(
        Mode(
            group=BY,
            name=f"{name}, {what}",
            spread=_by_transformers(**sizes),
            recipe=recipe,
            worlds=(2,),
        )
        for name, sizes in {
            "fsdp": {"fsdp_size": 2},
            "tp": {"tp_size": 2},
            "ep + fsdp": {"fsdp_size": 2, "ep_size": 2},
        }.items()
        for what, recipe in {
            "clipping": CLIPPED,
            "router=trainable": ROUTERS,
            "prune, two micro-batches": dataclasses.replace(PRUNE, micro=2),
            "checkpointing": Recipe(checkpointing=False),
        }.items()
    ),
    *(
        Mode(group=BY, name=name, spread=_by_transformers(**sizes), worlds=(4,))
        for name, sizes in {
            "fsdp x tp": {"fsdp_size": 2, "tp_size": 2},
            "fsdp with replicas": {"fsdp_size": 2, "dp_replicate_size": 2},
            "ep 2 + efsdp 2": {"fsdp_size": 4, "ep_size": 2},
            "ep 4 + fsdp": {"fsdp_size": 4, "ep_size": 4},
            "ep 4 + fsdp x tp": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
            "ep 2 + fsdp x tp": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
            "fsdp x tp of other layers": {"fsdp_size": 2, "tp_size": 2, "split_experts": False},
            "ep 2 + replicas": {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
        }.items()
    ),
)
