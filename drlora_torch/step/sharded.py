"""An adapter that processes hold together: what all of them must do, and what none can do alone."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator
from typing import Any

from torch import distributed

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.lora import parts
from drlora_torch.models import sharding
from drlora_torch.step.parameters import parameters_by_key
from drlora_torch.step.processes import several_processes

PATIENCE = datetime.timedelta(minutes=10)
"""How long one process waits for the others; as long as NCCL does."""


def is_sharded(attached: Attached) -> bool:
    """True if no process holds all that the adapter trains."""
    return any(map(parts.is_sharded, parameters_by_key(attached).values()))


def free_gathered(attached: Attached) -> None:
    """Free gathered copies, so that the parameters in the model are those that processes hold.

    A forward without a backward pass may leave them (``reshard_after_forward=False``).
    """
    if several_processes(attached.process_group):
        routers = [layer.record.router for layer in attached.layers.values()]
        names = [*attached.layers, *attached.modules, *(name for name in routers if name)]
        sharding.reshard(attached.model, names)


def check_rows(attached: Attached) -> None:
    """Refuse LoRA that processes hold together only in part, or not by whole rows.

    Raises:
        AttachError: names a parameter that was left out, or how it is cut.
    """
    named = {
        key: parameter
        for layer in attached.layers.values()
        for key, parameter in layer.lora.tensors().items()
    }
    sharded = {key for key, parameter in named.items() if parts.is_sharded(parameter)}
    if sharded and (whole := sorted(named.keys() - sharded)):
        raise AttachError(
            f"fully_shard has left out {len(whole)} of {len(named)} LoRA parameters "
            f"({whole[0]!r}), which each process would train on its own; leave none of "
            "adapter.parameters() in ignored_params, and shard the whole model, root included"
        )
    for key, parameter in named.items():
        if not parts.has_whole_rows(parameter):
            raise AttachError(
                f"{key} has the placements {getattr(parameter, 'placements', ())}, but its rows "
                "must stay whole: fully_shard cuts them so by default, and a shard_placement_fn "
                "must return Shard(0) for lora_A and lora_B"
            )


def check_whole(attached: Attached, action: str) -> None:
    """Refuse what needs the whole model in one process.

    Raises:
        AttachError: processes hold the model together.
    """
    if sharding.is_sharded(attached.model):
        raise AttachError(
            f"{action} needs the whole model in one process, and this one is sharded over "
            "several; right, with all of them:\n    adapter.save_pretrained(path)\n"
            "and then, in one process that loads the base model whole:\n"
            f"    drlora_torch.load(model, path).{action}"
        )


@contextlib.contextmanager
def meeting(attached: Attached, action: str) -> Iterator[None]:
    """Inside, all processes do the same; if it fails in one of them, it fails in all.

    Raises:
        CheckpointError: one process or more did not come in time, or failed.
    """
    free_gathered(attached)
    group = _meet(attached.process_group, action)
    failed: BaseException | None = None
    try:
        yield
    except Exception as error:
        failed = error
    reasons: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(reasons, failed and f"{failed}", group=group)
    if failed is not None:
        raise failed
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise CheckpointError(f"{action} failed in process {rank}: {reason}")


def _meet(group: Any, action: str) -> Any:
    """Wait for all processes of a group; one of theirs that can wait for a limited time."""
    try:
        meeting_place = _gloo_group(tuple(distributed.get_process_group_ranks(group)), PATIENCE)
        distributed.monitored_barrier(meeting_place, timeout=PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{action} needs all processes, since they hold the adapter together, but some did "
            f"not call it within {PATIENCE}; wrong:\n    if rank == 0:\n"
            f"        adapter.{action}(path)\nright, in every process (the first one writes):\n"
            f"    adapter.{action}(path)\n({str(error).strip().splitlines()[0]})"
        ) from error
    return meeting_place


@functools.lru_cache(maxsize=8)
def _gloo_group(ranks: tuple[int, ...], patience: datetime.timedelta) -> Any:
    return distributed.new_group(
        list(ranks), backend="gloo", timeout=patience, use_local_synchronization=True
    )
