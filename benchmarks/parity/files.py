"""Save in one topology, load in another: the adapter's file, and torch.distributed.checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import drlora_torch
from benchmarks.parity import modes, training
from benchmarks.parity.training import Model, Recipe, Trace

RECIPE = Recipe(attach={"router": "after_warmup"})
BEFORE, AFTER = 7, 3
"""Steps before a save, and after it is loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A way to spread a model over two processes."""

    load: Callable[[Path], tuple[Model, slice]]
    """From the folder of the model to the model and the rows of this process."""
    wrap: Callable[[Model], Any] = lambda model: model
    """Called after ``attach``."""
    alone: bool = False
    """Whether each process trains by itself."""
    strided: bool = False
    """Whether torch.distributed.checkpoint cannot save its frozen weights (Transformers' packed
    tensor parallelism)."""


def _load_whole(folder: Path) -> tuple[Model, slice]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    return model.train(), slice(None)


def _load_shared(folder: Path) -> tuple[Model, slice]:
    return _load_whole(folder)[0], modes.rows_of(distributed.get_world_size())


def _load_sharded(folder: Path) -> tuple[Model, slice]:
    model, rows = _load_shared(folder)
    return modes.shard(model), rows


TOPOLOGIES = {
    "one process": Topology(load=_load_whole, alone=True),
    "DDP": Topology(load=_load_shared, wrap=DistributedDataParallel),
    "`fully_shard` after": Topology(load=_load_shared, wrap=modes.shard),
    "`fully_shard` before": Topology(load=_load_sharded),
    "tp": Topology(load=lambda folder: modes.load_spread(folder, {"tp_size": 2}), strided=True),
    "ep + fsdp": Topology(
        load=lambda folder: modes.load_spread(folder, {"fsdp_size": 2, "ep_size": 2})
    ),
}
PAIRS = tuple(itertools.product(TOPOLOGIES, TOPOLOGIES))
DCP_PAIRS = (
    ("one process", "`fully_shard` after"),
    ("one process", "ep + fsdp"),
    ("`fully_shard` after", "`fully_shard` after"),
    ("`fully_shard` after", "`fully_shard` before"),
    ("`fully_shard` before", "one process"),
    ("ep + fsdp", "`fully_shard` after"),
    ("tp", "one process"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """From one topology into another, and on; compared with one process all the way."""

    source: str
    target: str
    dcp: bool
    equal_ranks: bool
    parameters: float
    """Largest relative difference."""


class Passages:
    """Makes them in one launch; all processes do the same."""

    def __init__(self, folder: Path, alone: Any) -> None:
        self.folder = folder
        self.alone = alone
        """A process group with this process alone."""

    def files(self) -> list[Passage]:
        """Through ``save_pretrained`` and ``load``, every pair; with a new optimizer after it."""
        for place, name in enumerate(TOPOLOGIES):
            model, _, adapter, _ = self._begin(name)
            adapter.save_pretrained(self.folder / str(place))
            del model
        distributed.barrier()
        ends = {(s, t): self._go_on(s, t) for s, t in PAIRS}
        first = ends["one process", "one process"]
        return [self._measure(s, t, end, first, dcp=False) for (s, t), end in ends.items()]

    def checkpoints(self) -> list[Passage]:
        """Through torch.distributed.checkpoint, the optimizer's state included."""
        found = []
        for place, (source, target) in enumerate(DCP_PAIRS):
            path = self.folder / f"dcp{place}"
            model, optimizer, adapter, rows = self._begin(source)
            options = StateDictOptions(ignore_frozen_params=TOPOLOGIES[source].strided)
            checkpoint.save(_state(model, optimizer, options), checkpoint_id=path)
            straight = self._train(model, adapter, rows, optimizer)
            model, optimizer, adapter, rows = self._attach(target)
            state = _state(model, optimizer, options)
            checkpoint.load(state, checkpoint_id=path)
            strict = StateDictOptions(strict=not TOPOLOGIES[source].strided)
            set_model_state_dict(model, state["model"], options=strict)
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
            end = self._train(model, adapter, rows, optimizer)
            found.append(self._measure(source, target, end, straight, dcp=True))
        return found

    def _begin(self, name: str) -> tuple[Any, torch.optim.Optimizer, drlora_torch.Adapter, slice]:
        model, optimizer, adapter, rows = self._attach(name)
        training.train(model, adapter, RECIPE, rows, range(BEFORE), optimizer)
        return model, optimizer, adapter, rows

    def _attach(self, name: str) -> tuple[Any, torch.optim.Optimizer, drlora_torch.Adapter, slice]:
        topology = TOPOLOGIES[name]
        model, rows = topology.load(self.folder / "model")
        group = self.alone if topology.alone else None
        (adapter,) = training.attach_all(model, RECIPE, 2 * BEFORE, group)
        wrapped = topology.wrap(model)
        return wrapped, torch.optim.AdamW(adapter.parameters(), lr=1e-2), adapter, rows

    def _go_on(self, source: str, target: str) -> Trace:
        topology = TOPOLOGIES[target]
        path = self.folder / str(list(TOPOLOGIES).index(source))
        model, rows = topology.load(self.folder / "model")
        group = self.alone if topology.alone else None
        adapter = drlora_torch.load(model, path, process_group=group)
        return self._train(topology.wrap(model), adapter, rows)

    def _train(
        self,
        model: Any,
        adapter: drlora_torch.Adapter,
        rows: slice,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Trace:
        return training.train(
            model, adapter, RECIPE, rows, range(BEFORE, BEFORE + AFTER), optimizer
        )

    def _measure(self, source: str, target: str, end: Trace, other: Trace, *, dcp: bool) -> Passage:
        held = zip(end.parameters, other.parameters, strict=True)
        far = max(float((a - b).abs().max() / b.abs().max()) for a, b in held)
        same = end.ranks == other.ranks
        return Passage(source=source, target=target, dcp=dcp, equal_ranks=same, parameters=far)


def _state(
    model: Any, optimizer: torch.optim.Optimizer, options: StateDictOptions
) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
