"""Both kernels over packed experts: results, what a backward pass keeps, and what is alive at once.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drlora_torch.lora import kernels
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import Kernel, expert_linear, grouped
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.lora.slots import Layout, SlotTable
from drlora_torch.lora.stored import Dense, Stored
from drlora_torch.quantized.four_bit import FourBit, FourBitWeight
from tests.torch.test_kernels import ROUTINGS

N = 5
SMALL, ODD_BLOCKS, LARGE = (16, 24), (8, 12), (64, 96)
"""I and O: six blocks of 64 an expert, one and a half, and more than all activations together."""
CASES = list(itertools.product([False, True], [False, True], [False, True], [False, True]))
"""gather, combine, bias, transposed; nobody gathers and combines at once."""
RANKS = [3, 1, 4, 0, 5]


def make_lora(kernel: Kernel, features: tuple[int, int], dropout: float = 0.0) -> ExpertLoRA:
    table = SlotTable(N * 4, N, 9, Layout.POOLED)
    table.grow(torch.tensor(RANKS).numpy())
    shapes = {"up": ProjectionShape(*features)}
    lora = ExpertLoRA("e", shapes, table, 0.5, dropout, 0, kernel)
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return lora


def pack(
    features: tuple[int, int],
    transposed: bool,
    dtype: torch.dtype = torch.float32,
    kind: str = "nf4",
    double_quant: bool = True,
) -> FourBitWeight:
    generator = torch.Generator().manual_seed(0)
    shape = (N, *(features if transposed else features[::-1]))
    weight = torch.randn(shape, generator=generator).to(dtype)
    form = FourBit(kind, double_quant, shape, N, dtype)
    return form.open(tuple(form.pack(weight).values()), transposed)


def unpacked(weight: FourBitWeight) -> Dense:
    return Dense((weight.unpack(0, N),), weight.transposed)


def forward(
    weight: Stored,
    routing: str,
    lora: ExpertLoRA | None,
    *,
    gather: bool = True,
    combine: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the output of one call, what it is differentiable in, and a gradient for it."""
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor(ROUTINGS[routing], dtype=torch.int64).reshape(-1, 2)
    dispatch = Dispatch.sort(index, N)
    _, inner, outer = weight.shape
    rows = len(index) if gather else index.numel()
    inputs = torch.randn(rows, inner, generator=generator).to(dtype).requires_grad_(True)
    biases = torch.randn(N, outer, generator=generator).to(dtype) if bias else None
    weights = torch.rand(index.shape, generator=generator).requires_grad_(True)
    torch.manual_seed(5)  # of dropout
    output = expert_linear(
        inputs,
        weight,
        biases,
        None if lora is None else lora.factors("up"),
        dispatch,
        gather=gather,
        routing_weights=weights if combine else None,
    )
    seed = torch.randn(output.shape, generator=generator).to(output.dtype)
    if not combine:  # a sentinel's row holds at most a bias, and nobody reads it
        seed = seed * dispatch.live.unsqueeze(-1)
        output = output * dispatch.live.unsqueeze(-1)
    learning = [] if lora is None else list(lora.parameters())
    return output, [inputs, *learning, *([weights] if combine else [])], seed


def run(weight: Stored, routing: str, lora: ExpertLoRA | None, **case: Any) -> list[Tensor]:
    """Output and all gradients of one call."""
    output, wanted, seed = forward(weight, routing, lora, **case)
    return [output.detach(), *torch.autograd.grad(output, wanted, seed)]


def check_same(have: list[Tensor], want: list[Tensor], rounding: float = 0.0) -> None:
    for left, right in zip(have, want, strict=True):
        assert left.dtype is right.dtype
        torch.testing.assert_close(left, right, rtol=rounding, atol=rounding)


def check_every_case(
    kernel: Kernel, routing: str, features: tuple[int, int], rounding: float = 0.0
) -> None:
    for gather, combine, bias, transposed in CASES:
        if gather and combine:
            continue
        weight = pack(features, transposed)
        case = {"gather": gather, "combine": combine, "bias": bias}
        lora = make_lora(kernel, features)
        have = run(weight, routing, lora, **case)
        want = run(unpacked(weight), routing, lora, **case)
        check_same(have, want, rounding)
        if ROUTINGS[routing] and "nothing" not in routing:
            assert all(bool(gradient.any()) for gradient in have)


@pytest.mark.parametrize("features", [SMALL, ODD_BLOCKS], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kernel", [Kernel.RAGGED, Kernel.GROUPED])
def test_packed_weights_multiply_as_unpacked_ones(
    kernel: Kernel, routing: str, features: tuple[int, int]
) -> None:
    """Bit for bit: output and the gradients of inputs, A, B and routing weights."""
    check_every_case(kernel, routing, features)


def limit_groups(monkeypatch: pytest.MonkeyPatch, features: tuple[int, int], experts: int) -> None:
    monkeypatch.setattr(grouped, "GROUP_BYTES", 4 * math.prod(features) * experts)


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_groups_of_experts_multiply_as_all_at_once(
    routing: str, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts and whole groups without tokens included."""
    limit_groups(monkeypatch, SMALL, experts)
    check_every_case(Kernel.GROUPED, routing, SMALL)


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", False), ("fp4", True), ("fp4", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [Kernel.RAGGED, Kernel.GROUPED])
def test_every_format_and_dtype(
    kernel: Kernel, dtype: torch.dtype, kind: str, double_quant: bool
) -> None:
    weight = pack(SMALL, False, dtype, kind, double_quant)
    lora = make_lora(kernel, SMALL, dropout=0.5)
    have = run(weight, "some", lora, dtype=dtype)
    check_same(have, run(unpacked(weight), "some", lora, dtype=dtype))
    assert all(bool(value.isfinite().all()) for value in have)


@pytest.mark.parametrize("kernel", [Kernel.RAGGED, Kernel.GROUPED])
def test_without_a_lora(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose", lambda *_: kernel)
    for routing in ROUTINGS:
        weight = pack(SMALL, True)
        check_same(run(weight, routing, None), run(unpacked(weight), routing, None))


# -- what is kept, and what is alive ---------------------------------------------------------------


def saved(run_forward: Callable[[], Any]) -> list[Tensor]:
    """Every tensor that autograd keeps for a backward pass."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run_forward()
    return found


def unpacked_among(tensors: list[Tensor], features: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of the floating-point tensors as large as the weight of an expert."""
    size = math.prod(features)
    return [tuple(t.shape) for t in tensors if t.is_floating_point() and t.numel() >= size]


@pytest.mark.parametrize("kernel", [Kernel.RAGGED, Kernel.GROUPED])
def test_no_unpacked_weight_is_kept_for_backward(kernel: Kernel) -> None:
    weight = pack(LARGE, False)
    for lora in (make_lora(kernel, LARGE, dropout=0.5), None):
        for combine in (False, True):
            case = {"gather": False, "combine": combine}
            kept = saved(functools.partial(forward, weight, "some", lora, **case))
            assert unpacked_among(kept, LARGE) == []
    codes = weight.tensors[0].data_ptr()
    assert codes in {tensor.data_ptr() for tensor in kept if tensor.dtype is torch.uint8}
    dense = unpacked(weight)
    lora = make_lora(kernel, LARGE)
    assert unpacked_among(saved(functools.partial(forward, dense, "some", lora)), LARGE)


class Alive(TorchDispatchMode):
    """Counts the storages of floating-point numbers, as large as an expert, that live at once."""

    def __init__(self, features: tuple[int, int], itemsize: int = 4) -> None:
        super().__init__()
        self.size = math.prod(features) * itemsize
        self.now = self.most = self.made = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tensors(args, kwargs)}
        result = func(*args, **(kwargs or {}))
        for leaf in tensors(result):
            storage = leaf.untyped_storage()
            known = storage._cdata in given | self._known
            if leaf.is_floating_point() and storage.nbytes() >= self.size and not known:
                self._enter(storage)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        count = storage.nbytes() // self.size
        self._known.add(storage._cdata)
        self.now, self.made = self.now + count, self.made + count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._leave, storage._cdata, count)

    def _leave(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def most_alive(weight: Stored, lora: ExpertLoRA | None, **case: Any) -> Alive:
    """Unpacked experts alive in a forward and its backward pass."""
    itemsize = (weight.dtype or torch.float32).itemsize
    with Alive((weight.shape[1], weight.shape[2]), itemsize) as alive:
        run(weight, "some", lora, **case)
    return alive


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_has_one_unpacked_expert_at_a_time(dtype: torch.dtype, transposed: bool) -> None:
    """Four of the five experts have tokens: each is unpacked in forward and again in backward."""
    weight = pack(LARGE, transposed, dtype)
    for lora in (make_lora(Kernel.RAGGED, LARGE, dropout=0.5), None):
        for gather, combine in ((True, False), (False, True)):
            alive = most_alive(weight, lora, gather=gather, combine=combine, bias=True, dtype=dtype)
            assert (alive.most, alive.made, alive.now) == (1, 2 * 4, 0)


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_grouped_has_one_unpacked_group_at_a_time(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_groups(monkeypatch, LARGE, experts)
    lora = make_lora(Kernel.GROUPED, LARGE, dropout=0.5)
    for transposed in (False, True):
        alive = most_alive(pack(LARGE, transposed), lora)
        assert (alive.most, alive.now) == (experts, 0)


def test_all_experts_are_one_group_where_they_fit() -> None:
    alive = most_alive(pack(LARGE, False), make_lora(Kernel.GROUPED, LARGE))
    assert (alive.most, alive.made, alive.now) == (N, 2 * N, 0)


@pytest.mark.parametrize("kernel", [Kernel.RAGGED, Kernel.GROUPED])
def test_another_dtype_costs_a_second_copy(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside autocast: an expert, or group, as it was packed, while it is converted."""
    limit_groups(monkeypatch, LARGE, 1)
    weight = pack(LARGE, False, torch.float32)
    with Alive(LARGE, 2) as alive:
        run(weight, "some", make_lora(kernel, LARGE), dtype=torch.bfloat16)
    assert alive.most == 3  # float32 takes the room of two; GROUP_BYTES has room for one of it
