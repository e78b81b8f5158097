"""Time and memory of a step against the rank that experts have, none included.

    python -m benchmarks.frontier

The router is skewed, as routers of trained models are on one task: LoRA on few experts saves most
where these get few tokens, and little where they get most of them.

Shape letters: N experts, H model width.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.optim import AdamW

import drlora_torch
from benchmarks import report
from benchmarks.blocks import SHAPES, Case
from benchmarks.memory import training_peaks
from benchmarks.methods import FROZEN, Builder, Training, frozen, plain
from benchmarks.options import Rounds, ShapeName
from benchmarks.rounds import interleave
from drlora_core import AllocatorConfig, AllocatorEngine

RANK = 16
SKEW = 0.5
"""Standard deviation of what is added to the router's logits, by expert; theirs is about 0.45."""
SIEVE, HOT = 0.25, 0.157
"""Shares of experts that have LoRA: MoE-Sieve (arXiv 2603.24044), HELLoRA on OLMoE (2605.18795)."""


class Skewed(Case):
    """A case whose router prefers some experts: the last feature of the input is 1 for all."""

    def __init__(self, name: ShapeName) -> None:
        super().__init__(SHAPES[name], torch.float32)
        generator = torch.Generator().manual_seed(3)
        for weights in self._weights:
            drawn = torch.randn(self.shape.experts, generator=generator)
            weights["gate.weight"][:, -1] = SKEW * drawn

    def hidden(self, tokens: int | None = None) -> torch.Tensor:
        """The input, with 1 in the last feature."""
        drawn = super().hidden(tokens).detach()
        drawn[..., -1] = 1.0
        return drawn.requires_grad_(True)

    def routing(self) -> list[np.ndarray]:
        """Share of the (token, expert) pairs that each expert of each layer gets, [N]."""
        model, hidden = self.blocks(), self.hidden()
        found: list[np.ndarray] = []

        def count(router: object, args: object, output: tuple[Any, ...]) -> None:
            pairs = torch.bincount(output[2].reshape(-1), minlength=self.shape.experts)
            found.append((pairs / pairs.sum()).numpy())

        for layer in model.layers:
            layer.gate.register_forward_hook(count)
        model(hidden)
        return found


def chosen(share: float, rank: int, coldest: bool = False) -> Builder:
    """LoRA of one rank on a share of the experts of each layer: the busiest, or the others."""

    def build(case: Case) -> Training:
        assert isinstance(case, Skewed)
        model, hidden = case.blocks(), case.hidden()
        count = round(share * case.shape.experts)
        config = AllocatorConfig(r_init=0, r_target=RANK, r_max=4 * RANK, growth_end=10**6)
        engine = AllocatorEngine(config)
        records = drlora_torch.discover(model)
        for record, shares in zip(records, case.routing(), strict=True):
            order = np.argsort(shares if coldest else -shares)
            ranks = np.zeros(case.shape.experts, dtype=np.int64)
            ranks[order[:count]] = rank
            engine.add_layer(record.name, case.shape.experts, ranks=ranks)
        adapter = drlora_torch.attach(model, engine)
        optimizer = AdamW(adapter.parameters(), lr=1e-4, fused=True)
        return Training(hidden, plain(model, hidden), optimizer, adapter)

    return build


METHODS: dict[str, Builder] = {
    FROZEN: frozen("grouped_mm"),
    "rank 16, all experts": chosen(1.0, RANK),
    "rank 8, all experts": chosen(1.0, RANK // 2),
    "rank 4, all experts": chosen(1.0, RANK // 4),
    "rank 2, all experts": chosen(1.0, RANK // 8),
    "rank 64, busiest 25 %": chosen(SIEVE, 4 * RANK),
    "rank 16, busiest 25 % (MoE-Sieve)": chosen(SIEVE, RANK),
    "rank 16, busiest 15.7 % (HELLoRA)": chosen(HOT, RANK),
    "rank 16, idlest 25 %": chosen(SIEVE, RANK, coldest=True),
    "rank 0": chosen(0.0, 0),
}


def main(
    shape: ShapeName = "small",
    rounds: Rounds = None,
    budget: Annotated[float, typer.Option(help="Seconds for all rounds.")] = 120.0,
) -> None:
    """Measure, print and write the table."""
    case = Skewed(shape)
    trainings = {name: build(case) for name, build in METHODS.items()}
    timings = interleave(trainings, rounds, budget)
    rows = []
    for name, build in METHODS.items():
        held: list[Training] = []

        def prepare(build: Builder = build, held: list[Training] = held) -> None:
            held.append(build(case))
            held[0]()

        above, _ = training_peaks(prepare, lambda held=held: held[0]())
        ranks = trainings[name].adapter.ranks() if trainings[name].adapter else {}
        total = sum(int(each.sum()) for each in ranks.values())
        uniform = case.shape.layers * case.shape.experts * RANK
        rows.append(
            [
                name,
                f"{total / uniform:.3f}" if ranks else "-",
                str(timings.ratio(name, FROZEN)),
                f"{above / 2**20:.0f}",
            ]
        )
    busiest = np.mean([np.sort(s)[::-1][: len(s) // 4].sum() for s in case.routing()])
    about = (
        f"{case.shape}, float32; {timings.rounds} interleaved rounds. The busiest quarter of the "
        f"experts gets {busiest:.0%} of the (token, expert) pairs. Parameters: trained ones over "
        f"those of rank {RANK} on all experts; time: a step over one of the frozen model, median "
        "(quartiles); memory: peak of a step above what is held between steps. The pool of slots "
        "is that of rank 16 on all experts in every row."
    )
    columns = ["LoRA", "parameters", "time / frozen", "MiB"]
    table = report.Table("", "", columns, rows)
    report.write(f"frontier_{shape}", "Steps with less rank, and none", about, [table])


if __name__ == "__main__":
    typer.run(main)
