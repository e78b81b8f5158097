"""The LoRA of one experts module: storage by rank slots, and the factors a forward needs.

Shape letters: P rank slots, I input and O output features, N experts, R active rank dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drlora_torch.lora import parts
from drlora_torch.lora.kernels import Kernel, LoRAFactors
from drlora_torch.lora.rows import RowGenerator
from drlora_torch.lora.slots import FREE, Born, IntArray, SlotTable
from drlora_torch.lora.spread import Spread


class ProjectionShape(NamedTuple):
    """Features of one projection of an expert."""

    in_features: int
    out_features: int


class SlotLoRA(nn.Module):
    """A [P, I] and B [P, O] of one projection; row s of both belongs to slot s.

    Free slots are exactly 0 in A and B and get no gradient, so neither weight decay nor an update
    can move them.
    """

    def __init__(self, shape: ProjectionShape, num_slots: int, rows: RowGenerator) -> None:
        super().__init__()
        self.shape = shape
        self.rows = rows
        self.lora_A = nn.Parameter(torch.zeros(num_slots, shape.in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_slots, shape.out_features))

    @torch.no_grad()
    def birth(self, born: Born) -> None:
        """Draw fresh rows of A and zero those of B, so that the layer's function stays."""
        here, rows = parts.find_rows(self.lora_A, born.slots)
        if here.size:
            owners = zip(born.experts[here], born.positions[here], strict=True)
            drawn = np.stack([self.rows.draw(*each) for each in owners])
            lora_A = parts.local(self.lora_A)
            lora_A[rows] = torch.from_numpy(drawn).to(lora_A)
        _zero(self.lora_B, born.slots)

    @torch.no_grad()
    def clear(self, slots: IntArray) -> None:
        """Zero the rows of freed slots."""
        _zero(self.lora_A, slots)
        _zero(self.lora_B, slots)


def _zero(parameter: Tensor, rows: IntArray) -> None:
    parts.local(parameter)[parts.find_rows(parameter, rows)[1]] = 0.0


class ExpertLoRA(nn.Module):
    """LoRA of all experts of one module, with one rank per expert shared by its projections.

    All slots start at zero: :meth:`draw` fills those that the table gives to experts, and
    :meth:`load` takes saved ones.

    Args:
        name: the layer's name in the engine; seeds the rows of A.
        shapes: features by projection name.
        table: the slot table, which holds the starting ranks.
        scaling: s, the factor of B A; the same for every expert and constant over training.
        dropout: probability of dropping an input of the low-rank part, in [0, 1).
        seed: seed of the rows of A.
        kernel: which code multiplies the experts.
    """

    def __init__(
        self,
        name: str,
        shapes: Mapping[str, ProjectionShape],
        table: SlotTable,
        scaling: float,
        dropout: float,
        seed: int,
        kernel: Kernel = Kernel.AUTO,
    ) -> None:
        super().__init__()
        self.name = name
        self.kernel = kernel
        self.table = table
        self.scaling = scaling
        self.dropout = dropout
        self.projections = nn.ModuleDict()
        for projection, shape in shapes.items():
            rows = RowGenerator(seed, name, projection, shape.in_features)
            self.projections[projection] = SlotLoRA(shape, table.num_slots, rows)
        self.spread: Spread | None = None
        """Where the rows of A and B are, if the experts were spread over processes before."""
        self._owned: _Owned | None = None  # of the table as it is now, on one device
        self._free: parts.HeldRows | None = None  # likewise

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def compute_device(self) -> torch.device:
        """Where forwards run; parameters may rest elsewhere (CPU offload)."""
        mesh = getattr(next(self.parameters()), "device_mesh", None)
        return self.device if mesh is None else torch.device(mesh.device_type)

    def items(self) -> list[tuple[str, SlotLoRA]]:
        return list(self.projections.items())  # type: ignore[arg-type]

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B of all projections, as files name them: ``{layer}/{projection}/lora_A``."""
        named = self.projections.named_parameters()
        return {f"{self.name}/{key.replace('.', '/')}": parameter for key, parameter in named}

    def shard(self, spread: Spread) -> None:
        """Spread A and B over the processes that hold the experts."""
        self.spread = spread
        for _, projection in self.items():
            projection.lora_A = spread.shard(projection.lora_A)
            projection.lora_B = spread.shard(projection.lora_B)

    def draw(self) -> None:
        """Draw the starting rows of A of every slot that has an owner."""
        active = self.table.active()
        self.birth(Born(active, self.table.owner[active], self.table.position[active]))

    def birth(self, born: Born) -> None:
        """Initialise slots that the table has just given to experts."""
        for _, projection in self.items():
            projection.birth(born)
        self._owned = self._free = None

    def clear(self, slots: IntArray) -> None:
        """Zero slots that the table has just freed."""
        for _, projection in self.items():
            projection.clear(slots)
        self._owned = self._free = None

    @torch.no_grad()
    def load(self, owner: IntArray, position: IntArray, tensors: Mapping[str, Tensor]) -> None:
        """Take a saved slot table and the values of A and B, named as :meth:`tensors` does."""
        self.table.load(owner, position)
        for key, parameter in self.tensors().items():
            parts.write(parameter, tensors[key])
        self._owned = self._free = None

    def free_slots(self) -> IntArray:
        """Slots without an owner, int64."""
        return np.flatnonzero(self.table.owner == FREE)

    @torch.no_grad()
    def hold_free_slots(self) -> None:
        """Zero the slots without an owner once more, where an optimizer may have moved them."""
        if self._free is None:
            self._free = parts.HeldRows(self.free_slots())
        for parameter in self.parameters():
            parts.local(parameter).index_fill_(0, self._free.of(parameter)[1], 0.0)

    def active_slots(self, device: torch.device) -> Tensor:
        """Slots with an owner, as :meth:`SlotTable.active` orders them, int64 on a device."""
        return self._owned_on(device).active

    def factors(self, projection: str) -> LoRAFactors | None:
        """What a forward needs of a projection; None where it is not a target."""
        slots = dict(self.items()).get(projection)
        if slots is None:
            return None
        lora_A: Tensor = slots.lora_A
        lora_B: Tensor = slots.lora_B
        owners, padded, _ = self._owned_on(lora_A.device)
        if self.spread is not None:
            lora_A = self.spread.gather(lora_A, projection, "lora_A")
            lora_B = self.spread.gather(lora_B, projection, "lora_B")
            owners, padded = owners[self.spread.experts], padded[self.spread.experts]
        dropout = self.dropout if self.training else 0.0
        return LoRAFactors(lora_A, lora_B, owners, padded, self.scaling, dropout, self.kernel)

    @property
    def num_local_experts(self) -> int:
        """Experts whose weights are here; all, but for expert parallelism."""
        chosen = slice(None) if self.spread is None else self.spread.experts
        return len(range(self.table.num_experts)[chosen])

    @torch.no_grad()
    def delta_weight(self, projection: str, expert: int) -> Tensor:
        """s * (B A) of one expert, [O, I], in the dtype of the LoRA parameters."""
        slots = dict(self.items())[projection]
        owned = torch.from_numpy(np.flatnonzero(self.table.owner == expert)).to(self.device)
        return self.scaling * (slots.lora_B[owned].T @ slots.lora_A[owned])

    def _owned_on(self, device: torch.device) -> _Owned:
        """The slots of each expert, uploaded once for each change of the table or device."""
        if self._owned is None or self._owned.padded.device != device:
            self._owned = _Owned.of(self.table, device)
        return self._owned


class _Owned(NamedTuple):
    """The slots of each expert in the order of its rank dimensions, as kernels take them."""

    slots: list[slice | Tensor | None]
    padded: Tensor  # int64 [N, R], -1 behind an expert's slots; R is a multiple of 8
    active: Tensor  # int64 [sum of ranks], all of them

    @classmethod
    def of(cls, table: SlotTable, device: torch.device) -> _Owned:
        active, ranks = table.active(), table.ranks()
        width = max(8, -(-int(ranks.max()) // 8) * 8)
        padded = np.full((ranks.size, width), -1, dtype=np.int64)
        padded[np.arange(width) < ranks[:, None]] = active
        slots = [_as_slice(owned, device) for owned in np.split(active, np.cumsum(ranks)[:-1])]
        return cls(slots, torch.from_numpy(padded).to(device), torch.from_numpy(active).to(device))


def _as_slice(slots: IntArray, device: torch.device) -> slice | Tensor | None:
    """The slots of an expert as a slice where they lie side by side: a view costs no copy."""
    if not slots.size:
        return None
    if (np.diff(slots) == 1).all():
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return torch.from_numpy(slots).to(device)
