"""An adapter that processes hold together: what all of them must do, and what none can do alone."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Iterator
from typing import Any

from torch import distributed

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.lora import parts
from drlora_torch.models import sharding
from drlora_torch.step.parameters import base_parameters, dense_parameters, parameters_by_key
from drlora_torch.step.processes import is_first_process, several_processes

PATIENCE = datetime.timedelta(minutes=10)
"""How long one process waits for the others; as long as NCCL does."""
_places: dict[Any, dict[tuple[int, ...], Any]] = {}
"""Groups of gloo to meet in, by the world that they are of and its ranks."""


def is_sharded(attached: Attached) -> bool:
    """True if no process holds all that the adapter trains."""
    free_gathered(attached)
    return any(map(parts.is_sharded, parameters_by_key(attached).values()))


def free_gathered(attached: Attached) -> None:
    """Free gathered copies, so that the parameters in the model are those that processes hold.

    A forward without a backward pass may leave them (``reshard_after_forward=False``).
    """
    if several_processes(attached.process_group):
        routers = [layer.record.router for layer in attached.layers.values()]
        names = [*attached.layers, *attached.modules, *attached.dense, *filter(None, routers)]
        sharding.reshard(sharding.around(attached.model, names))


def writes(attached: Attached) -> bool:
    """True for the first of the processes that hold an adapter together, and for any other."""
    return not is_sharded(attached) or is_first_process(attached.process_group)


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
    lora = named | dense_parameters(attached)
    sharded = {key for key, parameter in lora.items() if parts.is_sharded(parameter)}
    if sharded and (whole := sorted(lora.keys() - sharded)):
        raise AttachError(
            f"fully_shard has left out {len(whole)} of {len(lora)} LoRA parameters "
            f"({whole[0]!r}), which each process would train on its own; leave none of "
            "adapter.parameters() in ignored_params, and shard the whole model, root included"
        )
    if sharded:
        _check_base(attached)
        _check_group(attached, next(iter(named.values())))
    for key, parameter in named.items():
        if not parts.has_whole_rows(parameter):
            raise AttachError(
                f"{key} has the placements {getattr(parameter, 'placements', ())}, but its rows "
                "must stay whole: fully_shard cuts them so by default, and a shard_placement_fn "
                "must return Shard(0) for lora_A and lora_B"
            )


def _check_base(attached: Attached) -> None:
    """Refuse parameters of the base that learn and that nothing averages."""
    spreads = [layer.lora.spread for layer in attached.layers.values()]
    if all(spread is not None and spread.batches == 1 for spread in spreads):
        return  # all processes have the same batch, and so the same gradients
    for name, parameter in base_parameters(attached).items():
        if not parts.is_sharded(parameter):
            raise AttachError(
                f"{name} learns, but fully_shard has left it out, so each process would train its "
                "own; shard the whole model, root included: fully_shard(model)"
            )


def _check_group(attached: Attached, parameter: Any) -> None:
    """Refuse a process group without some of those that hold the LoRA."""
    held = set(parameter.device_mesh.mesh.flatten().tolist())
    train = set(distributed.get_process_group_ranks(attached.process_group))
    if not held <= train:
        raise AttachError(
            f"process_group has the processes {sorted(train)}, but the LoRA is held together by "
            f"{sorted(held)}, which must decide together; leave out process_group, or give a group "
            "with all of them to attach"
        )


def check_whole(attached: Attached, action: str) -> None:
    """Refuse what needs the whole model in one process.

    Raises:
        AttachError: processes hold the model together.
    """
    free_gathered(attached)
    if sharding.is_sharded(attached.model):
        raise AttachError(
            f"{action} needs the whole model in one process, and this one is sharded over "
            "several; right, with all of them:\n    adapter.save_pretrained(path)\n"
            "and then, in one process that loads the base model whole:\n"
            f"    drlora_torch.load(model, path).{action}"
        )


@contextlib.contextmanager
def together(attached: Attached, action: str, *, in_step: bool = True) -> Iterator[None]:
    """Inside, the processes that hold an adapter together do the same; alone, one does it.

    If it fails in one of them, it fails in all.

    Args:
        attached: the adapter.
        action: what they do, for errors.
        in_step: whether they must have made the same steps and decisions.

    Raises:
        CheckpointError: one process or more did not come in time, or failed, or has gone another
            way than the others.
    """
    if not is_sharded(attached):
        yield
        return
    with meeting(attached.process_group, action, _digest(attached) if in_step else ""):
        yield


@contextlib.contextmanager
def meeting(group: Any, action: str, state: str = "") -> Iterator[None]:
    """:func:`together` for the processes of a group, whose ``state`` must be the same."""
    place = _meet(group, action)
    if len(set(_gather(place, state))) > 1:
        raise CheckpointError(
            f"{action}: the processes hold an adapter together, but their steps or ranks differ "
            "(did only some of them restore a file?); bring all of them to one file: "
            "adapter.restore(path) in every process"
        )
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    reasons = _gather(place, None if failed is None else f"{failed}")
    if failed is not None:
        raise failed
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise CheckpointError(f"{action} failed in process {rank}: {reason}")


def _digest(attached: Attached) -> str:
    """Of all that must be the same in every process."""
    digest = hashlib.blake2b(f"{attached.engine.step_count}".encode(), digest_size=8)
    for layer in attached.layers.values():
        digest.update(layer.lora.table.owner.tobytes() + layer.lora.table.position.tobytes())
    return digest.hexdigest()


def _gather(group: Any, value: Any) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, value, group=group)
    return found


def _meet(group: Any, action: str) -> Any:
    """Wait for all processes of a group; one of theirs that can wait for a limited time."""
    try:
        ranks = tuple(distributed.get_process_group_ranks(group))
        place = _meeting_place(ranks)
        distributed.monitored_barrier(place, timeout=PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        _places.clear()  # the next time, they meet anew
        raise CheckpointError(
            f"{action} needs all processes, since they hold the adapter together, but some did "
            f"not call it within {PATIENCE}, or are gone; wrong:\n    if rank == 0:\n"
            f"        {action}(...)\nright, in every process (of a file, the first one writes it):"
            f"\n    {action}(...)\n({str(error).strip().splitlines()[0]})"
        ) from error
    return place


def _meeting_place(ranks: tuple[int, ...]) -> Any:
    world = distributed.group.WORLD
    if world not in _places:  # another one since
        _places.clear()
        assert world is not None
        _places[world] = {}
    if ranks not in _places[world]:
        _places[world][ranks] = distributed.new_group(
            list(ranks), backend="gloo", timeout=PATIENCE, use_local_synchronization=True
        )
    return _places[world][ranks]
