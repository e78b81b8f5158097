"""Cost of each training feature: time of a drlora step with it over one without.

    python -m benchmarks.features

Features are interleaved in rounds. For features that must not change the results, the table shows
the deviation of the gradients of LoRA and inputs from those of the plain step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import typer
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora_torch
from benchmarks import report
from benchmarks.blocks import SHAPES, Blocks, Case
from benchmarks.methods import (
    EVENT_EVERY,
    RANK,
    Action,
    Builder,
    Runner,
    Training,
    drlora,
    plain,
)
from benchmarks.options import Rounds, ShapeName
from benchmarks.rounds import interleave
from drlora_core import AllocatorConfig, AllocatorEngine

MICRO_BATCHES = 4
BUDGET = 180.0  # seconds
LAYERS = 2  # of the model whose graphs are counted
PLAIN = "plain: float32, static rank"


def checkpointed(reentrant: bool) -> Runner:
    """With gradient checkpointing of every block."""

    def make(model: nn.Module, hidden: Tensor) -> Action:
        assert isinstance(model, Blocks)
        model.reentrant = reentrant
        return plain(model, hidden)

    return make


def autocast(model: nn.Module, hidden: Tensor) -> Action:
    """With the forward under bfloat16 autocast."""

    def run() -> None:
        hidden.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(hidden)
        output.backward(torch.ones_like(output))

    return run


def accumulated(model: nn.Module, hidden: Tensor) -> Action:
    """With the same tokens in several micro-batches."""

    def run() -> None:
        hidden.grad = None
        for part in hidden.chunk(MICRO_BATCHES, dim=1):
            output = model(part)
            output.backward(torch.ones_like(output))

    return run


def deterministic(model: nn.Module, hidden: Tensor) -> Action:
    """Under ``torch.use_deterministic_algorithms``."""
    forward_backward = plain(model, hidden)

    def run() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            forward_backward()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def compiled(model: nn.Module, hidden: Tensor) -> Action:
    """Under ``torch.compile``."""
    torch.compiler.reset()
    return plain(torch.compile(model), hidden)


def graphs(model: nn.Module, *inputs: Tensor) -> int:
    """Number of graphs of a forward under ``torch.compile``; 1 without graph breaks."""
    torch.compiler.reset()
    ran = 0

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        def run(*given: object) -> object:
            nonlocal ran
            ran += 1
            return graph.forward(*given)

        return run

    forward = torch.compile(model, backend=backend)
    forward(*inputs)
    ran = 0
    forward(*inputs)
    torch.compiler.reset()
    return ran


def graphs_of_a_model() -> tuple[int, int]:
    """Number of graphs of a language model, without and with LoRA."""
    config = OlmoeConfig(
        vocab_size=32,
        eos_token_id=None,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model, tokens = OlmoeForCausalLM(config), torch.arange(8).unsqueeze(0)
    base = graphs(model, tokens)
    allocator = AllocatorConfig(r_init=2, r_target=2, r_max=2)
    adapter = drlora_torch.attach(model, AllocatorEngine(allocator))
    with adapter.paused():
        return base, graphs(model, tokens)


class SentinelRouter(nn.Module):
    """Replaces the last expert of each token by the sentinel, as under expert parallelism."""

    def __init__(self, router: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.router = router
        self.num_experts = num_experts

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = self.router(hidden)
        index = index.clone()
        index[:, -1] = self.num_experts
        return logits, weights, index


def sentinels(model: nn.Module, hidden: Tensor) -> Action:
    """With one sentinel per token."""
    assert isinstance(model, Blocks)
    for layer in model.layers:
        layer.gate = SentinelRouter(layer.gate, layer.experts.num_experts)
    return plain(model, hidden)


class Paused(Training):
    """Steps without statistics: static LoRA with our kernel."""

    def __call__(self) -> None:
        assert self.adapter is not None
        with self.adapter.paused():
            super().__call__()


def without_statistics(case: Case) -> Training:
    """Without statistics and events."""
    made = static()(case)
    return Paused(made.hidden, made.backward, made.optimizer, made.adapter)


def in_bfloat16(builder: Builder) -> Builder:
    """With a bfloat16 base."""
    return lambda case: builder(Case(case.shape, torch.bfloat16))


def static(runner: Runner = plain, **options: object) -> Builder:
    """Static rank, with a runner and options of ``attach``."""
    return drlora(r_max=RANK, growing=False, runner=runner, **options)


SAME: dict[str, Builder] = {
    PLAIN: static(),
    "plain, again (noise)": static(),
    "statistics off": without_statistics,
    "layout masked, r_max = 2 r_target": drlora(r_max=2 * RANK, growing=False, layout="masked"),
    "kernel grouped": static(kernel="grouped"),
    "checkpointing": static(checkpointed(reentrant=False)),
    "checkpointing, reentrant": static(checkpointed(reentrant=True)),
    f"accumulation over {MICRO_BATCHES} micro-batches of the same tokens": static(accumulated),
    "deterministic mode": static(deterministic),
    "torch.compile": static(compiled),
}
"""Features that must not change the results."""

OTHER: dict[str, Builder] = {
    f"dynamic ranks, an event every {EVENT_EVERY} steps": drlora(r_max=2 * RANK, growing=True),
    "dropout 0.1": static(dropout=0.1),
    "float32 base under bfloat16 autocast": static(autocast),
    "bfloat16 base, float32 LoRA, autocast": in_bfloat16(static(autocast)),
    "all bfloat16": in_bfloat16(static(dtype=torch.bfloat16)),
    "sentinels: one pair of each token to no expert": static(sentinels),
}
"""Features that change the results or the amount of work."""


def gradients(training: Training) -> Tensor:
    """Gradients of inputs and LoRA after one backward, concatenated.

    B is set to random values, because A gets no gradient while B is 0.
    """
    assert training.adapter is not None
    generator = torch.Generator().manual_seed(2)
    parts = []
    for layer in training.adapter.layers.values():
        active = torch.from_numpy(layer.lora.table.active())
        for _, projection in layer.lora.items():
            drawn = torch.randn(len(active), projection.lora_B.shape[1], generator=generator)
            projection.lora_B.data[active] = 0.02 * drawn
    training.backward()
    for layer in training.adapter.layers.values():
        active = torch.from_numpy(layer.lora.table.active())
        for parameter in layer.lora.parameters():
            assert parameter.grad is not None
            parts.append(parameter.grad[active].flatten())
            parameter.grad = None
    assert training.hidden.grad is not None
    return torch.cat([training.hidden.grad.flatten(), *parts])


def deviations(trainings: dict[str, Training]) -> dict[str, float]:
    """Relative deviation of the gradients from the plain step, for the features of ``SAME``."""
    with quiet_compiler():
        reference = gradients(trainings[PLAIN])
        found = {name: gradients(trainings[name]) for name in SAME}
    norm = reference.norm()
    return {name: float((value - reference).norm() / norm) for name, value in found.items()}


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Hide a warning about ``.grad`` that dynamo itself causes."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)
        yield


def main(
    shape: ShapeName = "small",
    rounds: Rounds = None,
) -> None:
    """Measure, print and write the table."""
    case = Case(SHAPES[shape], torch.float32)
    with quiet_compiler():
        base, adapted = graphs_of_a_model()
        trainings = {name: build(case) for name, build in (SAME | OTHER).items()}
        differing = deviations(trainings)
        timings = interleave(trainings, rounds, BUDGET)
    rows = [
        [
            name,
            f"{timings.median(name):.4f}",
            str(timings.ratio(name, PLAIN)),
            f"{differing[name]:.1e}" if name in differing else "-",
        ]
        for name in timings.seconds
    ]
    about = (
        f"{case.shape}, rank {RANK}; {timings.rounds} interleaved rounds. Ratio to the plain step: "
        "median (quartiles). Gradients: norm of the difference to those of the plain step over "
        "their norm. Under torch.compile, the experts break the graph: the forward of an OLMoE "
        f"with {LAYERS} layers has {adapted} graphs with LoRA and {base} without."
    )
    columns = ["feature", "s / step", "/ plain", "gradients"]
    report.write(
        f"features_{shape}",
        "Cost of training features",
        about,
        [report.Table("", "", columns, rows)],
    )


if __name__ == "__main__":
    typer.run(main)
