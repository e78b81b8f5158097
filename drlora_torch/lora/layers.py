"""The LoRA of one experts module: storage by rank slots, and the factors a forward needs.

Shape letters: P rank slots, I input and O output features, N experts, R active rank dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drlora_torch.lora import parts
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import Kernel, LoRAFactors, choose, code_of, compiled
from drlora_torch.lora.kernels.factors import ROUNDED, Owned
from drlora_torch.lora.kernels.product import Inputs, Product
from drlora_torch.lora.rows import RowGenerator
from drlora_torch.lora.slots import FREE, Born, IntArray, SlotTable
from drlora_torch.lora.spread import Spread
from drlora_torch.lora.stored import Stored
from drlora_torch.lora.tie import tie


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
    def birth(self, rows: Tensor, experts: Tensor, positions: Tensor) -> None:
        """Draw fresh rows of A and zero those of B, so that the layer's function stays.

        int64 tensors on the device: rows that are here, and whose they are.
        """
        lora_A = parts.local(self.lora_A)
        lora_A.index_copy_(0, rows, self.rows.draw_all(experts, positions).to(lora_A))
        self.clear_B(rows)

    @torch.no_grad()
    def clear(self, rows: Tensor) -> None:
        """Zero rows that are here, int64 on the device."""
        parts.local(self.lora_A).index_fill_(0, rows, 0.0)
        self.clear_B(rows)

    @torch.no_grad()
    def clear_B(self, rows: Tensor) -> None:
        """Zero rows of B alone."""
        parts.local(self.lora_B).index_fill_(0, rows, 0.0)


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
        self.base: Callable[[str], Stored] | None = None
        """From a projection to the weights beside it, once the layer runs with this LoRA."""
        self._owned: Owned | None = None  # of the table as it is now, on one device
        self._free: parts.HeldRows | None = None  # likewise
        self._number = compiled.register(self)

    @property
    def some(self) -> nn.Parameter:
        """A parameter that speaks for all: they have the same rows, device and placements."""
        return self.matrices()[0]

    def matrices(self) -> list[nn.Parameter]:
        """A and B of each projection: what ``parameters()`` gives, without its search."""
        return [each for _, slots in self.items() for each in (slots.lora_A, slots.lora_B)]

    @property
    def is_idle(self) -> bool:
        """True while no expert has a rank dimension, so that the layer runs as without LoRA."""
        return self.spread is None and self.table.is_empty

    def tie(self, values: Tensor) -> Tensor:
        """Make values depend on A and B, which the product beside them may not use."""
        return tie(values, self.matrices())

    @property
    def device(self) -> torch.device:
        return self.some.device

    @property
    def compute_device(self) -> torch.device:
        """Where forwards run; parameters may rest elsewhere (CPU offload)."""
        mesh = getattr(self.some, "device_mesh", None)
        return self.device if mesh is None else torch.device(mesh.device_type)

    def items(self) -> list[tuple[str, SlotLoRA]]:
        return list(self.projections._modules.items())  # type: ignore[arg-type]

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B of all projections, as files name them: ``{layer}/{projection}/lora_A``."""
        names = (f"{self.name}/{key}/lora_{each}" for key, _ in self.items() for each in "AB")
        return dict(zip(names, self.matrices(), strict=True))

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
        self._owned = self._free = None
        here, rows = parts.find_rows(self.some, born.slots)
        if here.size:
            whose = torch.from_numpy(np.stack([born.experts[here], born.positions[here]]))
            experts, positions = whose.to(rows.device)
            for _, projection in self.items():
                projection.birth(rows, experts, positions)

    def clear(self, slots: IntArray) -> None:
        """Zero slots that the table has just freed."""
        self._owned = self._free = None
        rows = parts.find_rows(self.some, slots)[1]
        for _, projection in self.items():
            projection.clear(rows)

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
        for parameter in self.matrices():
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
        owned = self._owned_on(lora_A.device)
        if self.spread is not None:
            lora_A = self.spread.gather(lora_A, projection, "lora_A")
            lora_B = self.spread.gather(lora_B, projection, "lora_B")
            owned = owned.of_experts(self.spread.experts)
        dropout = self.dropout if self.training else 0.0
        return LoRAFactors(lora_A, lora_B, owned, self.scaling, dropout, self.kernel)

    def code(self, projection: str, dtype: torch.dtype) -> Any:
        """The kernel that multiplies inputs of a data type."""
        assert self.base is not None
        return code_of(choose(self.kernel, self.base(projection), dtype))

    def product(
        self, projection: str, bias: Tensor | None, dropout: float, dispatch: Dispatch, gather: bool
    ) -> Product:
        """What the kernel multiplies, with the slots as they are now."""
        assert self.base is not None
        owned = self._owned_on(self.compute_device)
        weight = self.base(projection)
        return Product(weight, bias, owned, self.scaling, dropout, dispatch, gather)

    def fits_in_graph(self, projections: Iterable[str]) -> bool:
        """True if all projections of a layer can be part of a graph of ``torch.compile``."""
        return self.spread is None and all(name in self.projections for name in projections)

    def compiled(
        self,
        projection: str,
        inputs: Tensor,
        bias: Tensor | None,
        dispatch: Dispatch,
        gather: bool = False,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """:func:`drlora_torch.lora.kernels.expert_linear` in a graph of ``torch.compile``."""
        slots: Any = self.projections[projection]
        given = Inputs(inputs, slots.lora_A, slots.lora_B, routing_weights)
        dropout, most = self.dropout if self.training else 0.0, self.table.r_max
        width = -(-most // ROUNDED) * ROUNDED
        return compiled.expert_linear(
            self._number, given, bias, dispatch, projection,
            gather=gather, dropout=dropout, width=width,
        )  # fmt: skip

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

    def _owned_on(self, device: torch.device) -> Owned:
        """The slots of each expert, uploaded once for each change of the table or device."""
        if self._owned is None or self._owned.table.device != device:
            self._owned = Owned.of(self.table, device)
        return self._owned
