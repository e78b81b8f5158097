"""The two kernels compute the same, values and gradients, on every class of shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from drlora_torch.errors import AttachError
from drlora_torch.lora import kernels
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import Kernel, LoRAFactors, expert_linear
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.lora.slots import Layout, SlotTable
from drlora_torch.lora.stored import Dense
from drlora_torch.step.importance import mean_sensitivity
from tests.marks import slow_but
from tests.torch import helpers, models

N, I, O = 5, 16, 24  # noqa: E741 - the letters of the legends
ROUTINGS = {
    "some": [[0, 3], [3, 1], [4, 0], [1, 3], [0, 4]],
    "one expert for all": [[2, 2], [2, 2], [2, 2]],
    "one token": [[4, 1]],
    "no token": torch.zeros(0, 2, dtype=torch.int64).tolist(),
    "sentinels": [[5, 0], [5, 5], [1, 5]],
    "nothing but sentinels": [[5, 5]],
}


def make_lora(kernel: str, ranks: list[int]) -> ExpertLoRA:
    table = SlotTable(N * 4, N, 9, Layout.POOLED)
    table.grow(torch.tensor(ranks).numpy())
    lora = ExpertLoRA("e", {"up": ProjectionShape(I, O)}, table, 0.5, 0.0, 0, Kernel(kernel))
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return lora


def run(
    kernel: str, routing: Any, ranks: list[int], dtype: torch.dtype, **case: bool
) -> list[Tensor]:
    """Output and all gradients of one call."""
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor(routing, dtype=torch.int64).reshape(-1, 2)
    dispatch = Dispatch.sort(index, N)
    rows = len(index) if case["gather"] else index.numel()
    inputs = torch.randn(rows, I, generator=generator).to(dtype).requires_grad_(True)
    shape = (N, I, O) if case["transposed"] else (N, O, I)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(N, O, generator=generator).to(dtype) if case["bias"] else None
    weights = torch.rand(index.shape, generator=generator).requires_grad_(True)
    lora = make_lora(kernel, ranks)
    factors = lora.factors("up")
    assert isinstance(factors, LoRAFactors)
    output = expert_linear(
        inputs,
        Dense((weight,), case["transposed"]),
        bias,
        factors,
        dispatch,
        gather=case["gather"],
        routing_weights=weights if case["combine"] else None,
    )
    seed = torch.randn(output.shape, generator=generator).to(output.dtype)
    if not case["combine"]:  # a sentinel's row holds at most a bias, and nobody reads it
        seed = seed * dispatch.live.unsqueeze(-1)
        output = output * dispatch.live.unsqueeze(-1)
    wanted = [inputs, *lora.parameters(), *([weights] if case["combine"] else [])]
    return [output.detach(), *torch.autograd.grad(output, wanted, seed)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("gather", "combine"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_agree(
    routing: str, transposed: bool, gather: bool, combine: bool, bias: bool
) -> None:
    case = {"transposed": transposed, "gather": gather, "combine": combine, "bias": bias}
    for ranks in ([3, 1, 4, 1, 5], [4, 4, 4, 4, 4]):
        ours = run("ragged", ROUTINGS[routing], ranks, torch.float32, **case)
        theirs = run("grouped", ROUTINGS[routing], ranks, torch.float32, **case)
        for left, right in zip(ours, theirs, strict=True):
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["ragged", "grouped"])
def test_rows_of_sentinels_that_hold_anything_reach_nobody(kernel: str) -> None:
    """Two products in a row, as the interface of Transformers has them, with biases."""
    found = []
    for sentinels in (True, False):
        index = torch.tensor(ROUTINGS["sentinels"])
        dispatch, lora = Dispatch.sort(index, N, sentinels=sentinels), make_lora(kernel, [3] * N)
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(N, *size, generator=generator) for size in ((O, I), (I, O)))
        biases = [torch.randn(N, size, generator=generator) for size in (O, I)]
        tokens = torch.randn(len(index), I, generator=generator).requires_grad_()
        weights = torch.rand(index.shape, generator=generator).requires_grad_()
        rows = expert_linear(
            tokens, Dense((first,), False), biases[0], lora.factors("up"), dispatch, gather=True
        )
        if not sentinels:
            rows = rows.where(dispatch.live.unsqueeze(-1), torch.nan)
        output = expert_linear(
            rows, Dense((second,), False), biases[1], None, dispatch, routing_weights=weights
        )
        wanted = [tokens, weights, *lora.parameters()]
        found.append([output.detach(), *torch.autograd.grad(output.sum(), wanted)])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kernel", ["ragged", "grouped"])
def test_the_weight_of_a_sentinel_may_be_anything(kernel: str) -> None:
    index = torch.tensor(ROUTINGS["sentinels"])
    dispatch, lora = Dispatch.sort(index, N), make_lora(kernel, [3, 1, 4, 1, 5])
    weights = torch.full(index.shape, 0.5).masked_fill(index >= N, torch.nan).requires_grad_()
    inputs = torch.ones(index.numel(), I, requires_grad=True)
    output = expert_linear(
        inputs, Dense((torch.ones(N, O, I),), False), None, lora.factors("up"), dispatch,
        routing_weights=weights,
    )  # fmt: skip
    wanted = [inputs, weights, *lora.parameters()]
    found = torch.autograd.grad(output.sum(), wanted)
    assert all(each.isfinite().all() for each in (output, *found))


def test_kernels_agree_in_half_precision() -> None:
    case = {"transposed": False, "gather": True, "combine": False, "bias": False}
    ours = run("ragged", ROUTINGS["some"], [3, 1, 4, 1, 5], torch.bfloat16, **case)
    theirs = run("grouped", ROUTINGS["some"], [3, 1, 4, 1, 5], torch.bfloat16, **case)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_training_is_the_same_under_both_kernels(family: str) -> None:
    losses, ranks = {}, {}
    for kernel in ("ragged", "grouped"):
        model = models.build(family)
        adapter = helpers.attach(model, kernel=kernel)
        optimizer = helpers.adamw(adapter)
        losses[kernel] = [helpers.step(model, optimizer, seed) for seed in range(6)]
        ranks[kernel] = helpers.rank_history(adapter)
    assert losses["grouped"] == pytest.approx(losses["ragged"], rel=1e-4)
    assert ranks["grouped"] == ranks["ragged"]


def test_grouped_is_refused_where_torch_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("olmoe", dtype=torch.float64)
    with pytest.raises(AttachError, match=r"kernel='grouped'.*float64.*kernel='ragged'"):
        helpers.attach(model, kernel="grouped")
    assert not any("drlora" in name for name, _ in model.named_parameters())


def test_slots_are_where_the_lora_is() -> None:
    """On a GPU that is made up: an index on another device than the storage is an error there."""
    lora = make_lora("ragged", [2, 1, 3, 0, 2])
    lora.birth(lora.table.grow(torch.tensor([2, 0, 1, 1, 0]).numpy()))  # no longer side by side
    on_cpu = lora.factors("up")
    assert on_cpu is not None
    assert sum(isinstance(slots, Tensor) for slots in on_cpu.owned.slots) == 2
    assert lora.factors("up").owned is on_cpu.owned  # type: ignore[union-attr]  # made once
    with FakeTensorMode(allow_non_fake_inputs=True):
        storage = torch.empty(lora.table.num_slots, I, device="cuda")
        owned = lora._owned_on(storage.device)
        assert owned.table.device == storage.device
        for slots in owned.slots:
            if isinstance(slots, Tensor):
                assert storage.index_select(0, slots).device == storage.device


@pytest.mark.parametrize(("capability", "grouped"), [((7, 5), False), ((8, 0), True)])
def test_auto_takes_grouped_where_the_gpu_can(
    capability: tuple[int, int], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers checks it for its own grouped experts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = kernels.choose(Kernel.AUTO, FakeWeight(torch.device("cuda", 0)), torch.bfloat16)
    assert chosen is (Kernel.GROUPED if grouped else Kernel.RAGGED)
    assert (
        kernels.choose(Kernel.AUTO, FakeWeight(torch.device("cpu")), torch.bfloat16)
        is Kernel.RAGGED
    )
    assert (
        kernels.choose(Kernel.RAGGED, FakeWeight(torch.device("cuda", 0)), torch.bfloat16)
        is Kernel.RAGGED
    )


class FakeWeight:
    """What is asked of a weight."""

    dtype = torch.bfloat16
    shape = (4, 16, 32)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def element_size(self) -> int:
        return 2


NARROW = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("kernel", ["ragged", "grouped"])
@pytest.mark.parametrize("lora", NARROW)
@pytest.mark.parametrize("base", slow_but(NARROW, NARROW[-1:]))
def test_all_pairs_of_dtypes_train_before_and_after_growth(
    base: str, lora: str, kernel: str
) -> None:
    """Growth leaves experts whose slots lie apart, which no slice reaches."""
    model = models.build("olmoe", dtype=getattr(torch, base))
    adapter = helpers.attach(model, dtype=lora, kernel=kernel)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    losses = [helpers.step(model, optimizer, seed) for seed in range(7)]
    assert all(torch.tensor(losses).isfinite())
    assert (len(adapter.events), adapter.skipped_steps) == (2, 0)
    for parameter in adapter.parameters():
        assert parameter.dtype is getattr(torch, lora)
    helpers.fill(adapter)
    model(**helpers.batch()).loss.backward()
    for _, projection, layer, slots in helpers.projections(adapter):
        for parameter in (slots.lora_A, slots.lora_B):
            assert parameter.grad is not None
            assert parameter.grad.dtype is parameter.dtype
            assert parameter.grad[layer.table.active()].any(), projection


def test_importance_of_a_float16_lora_does_not_underflow() -> None:
    """Products of 1e-4 and 1e-5 are 0 in float16, whose smallest number is 6e-8."""
    parameter, gradient = torch.full((2, 8), 1e-4).half(), torch.full((2, 8), 1e-5).half()
    expected = (parameter.double() * gradient.double()).mean(dim=1)
    assert not (parameter * gradient).any()
    torch.testing.assert_close(
        mean_sensitivity([parameter], [gradient])[0], expected, rtol=1e-6, atol=0
    )
