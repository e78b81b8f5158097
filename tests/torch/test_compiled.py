"""``torch.compile``: one graph, nothing compiled anew when ranks grow, the same training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from drlora_torch.lora.kernels import compiled, grouped
from tests.marks import slow_and_thinned
from tests.torch import helpers, models

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own
Seen = tuple[list[float], dict[str, list[int]], dict[str, list[float]]]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compile_whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def compile_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def as_it_is(model: nn.Module) -> Any:
    return model


def masked_batch(seed: int) -> dict[str, Tensor]:
    """Padding on the left, for half of the rows."""
    batch = helpers.batch(seed)
    mask = torch.ones_like(batch["input_ids"])
    mask[::2, :3] = 0
    return {**batch, "attention_mask": mask}


def train(family: str, prepare: Any, *, padded: bool = False, **options: Any) -> Seen:
    """Losses of six steps of two micro-batches with two events, ranks and saliency."""
    model = models.build(family)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # Transformers leaves some of gpt-oss as they were made
        parameter.data.normal_(0.0, 0.1, generator=generator)
    adapter = helpers.attach(model, **options)
    optimizer, called, losses = helpers.adamw(adapter), prepare(model), []
    make = masked_batch if padded else helpers.batch
    torch.manual_seed(0)
    for seed in range(6):
        for part in (0, 1):
            loss = called(**make(2 * seed + part)).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert len(adapter.events) == 2
    assert adapter.skipped_steps == 0
    engine = adapter.engine
    saliency = {name: engine.saliency(name).tolist() for name in engine.layer_names}
    ranks = helpers.rank_history(adapter)
    return losses, ranks, saliency


@pytest.mark.parametrize("family", slow_and_thinned([("olmoe",), ("gpt_oss",), ("nemotron_h",)]))
def test_growth_compiles_nothing_anew(family: str) -> None:
    """Every loss, rank and saliency is that of the model as it is, bit for bit."""
    wanted = train(family, as_it_is)
    assert train(family, compile_whole) == wanted
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


@pytest.mark.parametrize(
    "options",
    slow_and_thinned([({"kernel": "grouped"},), ({"dropout": 0.5},), ({"layout": "masked"},)]),
)
def test_options_hold_in_the_graph(options: dict[str, Any]) -> None:
    assert train("olmoe", compile_whole, **options) == train("olmoe", as_it_is, **options)


@pytest.mark.slow
def test_padding_is_left_out_in_the_graph() -> None:
    wanted = train("olmoe", as_it_is, padded=True)
    assert train("olmoe", compile_whole, padded=True) == wanted
    assert wanted[2] != train("olmoe", as_it_is)[2]


def test_layers_may_be_compiled_alone() -> None:
    assert train("olmoe", compile_layers, padded=True) == train("olmoe", as_it_is, padded=True)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_evaluation_counts_nothing_in_the_graph() -> None:
    model = models.build("olmoe")
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    called = compile_whole(model)
    with torch.no_grad():
        found = called(**helpers.batch()).logits
        assert torch.equal(found, model(**helpers.batch()).logits)
    with adapter.disabled(), torch.no_grad():
        assert torch.equal(called(**helpers.batch()).logits, model(**helpers.batch()).logits)
    assert not helpers.pending(adapter)


@pytest.mark.parametrize("kernel", ["ragged", "grouped"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_is_registered_correctly(kernel: str, weighted: bool) -> None:
    """torch's own check: schema, fake tensors, gradients."""
    model = models.build("olmoe")
    adapter = helpers.attach(model, kernel=kernel)
    helpers.uneven(adapter)
    lora: Any = next(iter(adapter.layers.values())).lora
    name = "down_proj" if weighted else "gate_up_proj"
    slots = lora.projections[name]
    index = torch.tensor([[0, 3], [2, 1], [3, 0]])
    dispatch = compiled.Dispatch.sort(index, lora.table.num_experts)
    rows = index.numel() if weighted else len(index)
    inputs = torch.randn(rows, slots.shape.in_features, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True) if weighted else None
    sorted_rows = [dispatch.order, dispatch.tokens, dispatch.experts, dispatch.offsets]
    numbers = list(compiled.Call(lora._number, int(not weighted), 8, 2, 1))
    args = (inputs, slots.lora_A, slots.lora_B, weights, None, sorted_rows, name, 0.0, numbers)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(compiled._forward, args, test_utils=tests)
    assert grouped.low_dtype(torch.float16, torch.float32) is torch.float16


def compile_around(model: nn.Module) -> Any:
    """Graph breaks are allowed."""
    return torch.compile(model, backend="aot_eager")


def compile_blocks(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager")
    return model


@pytest.mark.slow
def test_projections_without_lora_leave_the_graph() -> None:
    options = {"targets": ["down_proj"]}
    assert train("olmoe", compile_around, **options) == train("olmoe", as_it_is, **options)


@pytest.mark.parametrize("prepare", slow_and_thinned([(compile_around,), (compile_layers,)]))
def test_dropout_is_drawn_again_as_it_was(prepare: Any) -> None:
    """Gradient checkpointing computes a forward twice: both draw the same."""

    def gradients(prepared: Any) -> list[Tensor]:
        model = models.build("olmoe")
        adapter = helpers.attach(model, dropout=0.5)
        helpers.uneven(adapter)
        helpers.checkpoint_activations(model, reentrant=False)
        called = prepared(model)
        torch.manual_seed(0)
        called(**helpers.batch()).loss.backward()
        return [p.grad for p in adapter.parameters() if p.grad is not None]

    for ours, theirs in zip(gradients(prepare), gradients(as_it_is), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", slow_and_thinned([(False,), (True,)]))
def test_padding_is_left_out_of_blocks_that_run_again(reentrant: bool) -> None:
    """Blocks are compiled alone, inside of gradient checkpointing."""
    model = models.build("olmoe")
    adapter = helpers.attach(model)
    helpers.checkpoint_activations(model, reentrant=reentrant)
    if reentrant:
        model.enable_input_require_grads()
    batch = masked_batch(0)
    compile_blocks(model)(**batch).loss.backward()
    counted = [
        float(sums[-1]) for key, sums in helpers.pending(adapter).items() if "routing" in key
    ]
    assert counted == [float(batch["attention_mask"].sum())] * len(adapter.layers)


def test_a_forward_counts_once_or_not_at_all() -> None:
    model = models.build("olmoe", num_hidden_layers=1)
    adapter = helpers.attach(model)
    called = compile_whole(model)
    loss = called(**helpers.batch()).loss
    loss.backward(retain_graph=True)
    (once,) = (sums for key, sums in helpers.pending(adapter).items() if "routing" in key)
    loss.backward()
    (again,) = (sums for key, sums in helpers.pending(adapter).items() if "routing" in key)
    assert torch.equal(once, again)
    with adapter.paused():
        loss = called(**helpers.batch()).loss
    loss.backward()
    (paused,) = (sums for key, sums in helpers.pending(adapter).items() if "routing" in key)
    assert torch.equal(once, paused)
    loss = called(**helpers.batch()).loss
    adapter.detach()
    loss.backward()  # nobody counts it any more


def test_operators_stay_out_of_cuda_graphs() -> None:
    """What is replayed runs no code of ours."""
    for name in ("expert_linear", "expert_linear_backward", "count", "reached"):
        operator = getattr(torch.ops.drlora, name).default
        assert torch.Tag.cudagraph_unsafe in operator.tags
