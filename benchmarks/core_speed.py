"""Speed of drlora_core against its goals.

    python -m benchmarks.core_speed

The comparison with PEFT's AdaLoRA needs peft and torch, and is skipped without them.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import report
from drlora_core import AllocatorConfig, AllocatorEngine, Recording, replay


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    what: str
    measured: str
    goal: str = "-"
    met: bool | None = None

    def row(self) -> list[str]:
        """Cells of the table."""
        return [
            self.what,
            self.measured,
            self.goal,
            {None: "-", True: "yes", False: "no"}[self.met],
        ]


def config(**changes: object) -> AllocatorConfig:
    """By default, no event before step 10,000."""
    values = {
        "r_init": 8,
        "r_target": 16,
        "r_max": 32,
        "warmup_steps": 10_000,
        "growth_interval": 1,
        "growth_end": 10_010,
    }
    return AllocatorConfig(**(values | changes))  # type: ignore[arg-type]


class Run:
    """An engine, and random statistics drawn before the clock starts."""

    def __init__(self, layers: int, experts: int, settings: AllocatorConfig) -> None:
        self.engine = AllocatorEngine(settings)
        self.names = [f"layers.{index}.mlp.experts" for index in range(layers)]
        for name in self.names:
            self.engine.add_layer(name, experts)
        rng = np.random.default_rng(0)
        self.routing = rng.random((layers, experts))
        self.importance = rng.random((layers, experts))

    def observe(self) -> None:
        for index, name in enumerate(self.names):
            self.engine.observe(
                name, routing=self.routing[index], importance=self.importance[index]
            )

    def step(self) -> None:
        self.observe()
        self.engine.step()


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def statistics_of_a_step() -> Measurement:
    run = Run(61, 384, config())
    seconds(run.step, 20)
    value = seconds(run.step, 300) * 1e3
    return Measurement(
        "statistics of one step, 61 layers x 384 experts", f"{value:.2f} ms", "< 1 ms", value < 1.0
    )


def statistics_in_one_call() -> Measurement:
    """Time of ``observe_all`` only, without the step that follows it."""
    run, times = Run(61, 384, config()), []
    for _ in range(320):
        started = time.perf_counter()
        run.engine.observe_all(routing=run.routing, importance=run.importance)
        times.append(time.perf_counter() - started)
        run.engine.step()
    value = statistics.median(times[20:]) * 1e3
    return Measurement(
        "the same by one call of observe_all", f"{value:.2f} ms", "< 0.5 ms", value < 0.5
    )


def growth_event(policy: str, scope: str, goal: float) -> Measurement:
    """Time of the event only, without the statistics of its step; ``goal`` in milliseconds."""
    settings = config(warmup_steps=0, growth_end=40, policy=policy, scope=scope)
    run, times = Run(61, 384, settings), []
    for _ in range(40):
        run.observe()
        started = time.perf_counter()
        assert run.engine.step() is not None
        times.append(time.perf_counter() - started)
    value = statistics.median(times) * 1e3
    return Measurement(
        f"one growth event, 61 x 384, policy {policy}, scope {scope}",
        f"{value:.2f} ms",
        f"< {goal:g} ms",
        value < goal,
    )


def a_million_experts() -> Measurement:
    """The same layer size with 43 times as many layers: 61 x 384 against 2,605 x 384."""
    small, large = Run(61, 384, config()), Run(2605, 384, config())
    seconds(small.step, 20)
    ratios = []
    for _ in range(9):
        one = seconds(small.step, 20) / (61 * 384)
        ratios.append(seconds(large.step, 2) / (2605 * 384) / one)
    value = statistics.median(ratios)
    return Measurement(
        "cost per expert of a step, 1,000,320 experts over 23,424", f"{value:.2f}", "<= 1.3",
        value <= 1.3,
    )  # fmt: skip


def one_wide_layer() -> Measurement:
    """For information: a single layer of a million experts."""
    small, large = Run(61, 384, config()), Run(1, 1_000_000, config())
    seconds(small.step, 20)
    one = seconds(small.step, 100) / (61 * 384)
    value = seconds(large.step, 10) / 1_000_000 / one
    return Measurement("the same, in one layer of 1,000,000 experts", f"{value:.2f}")


def replay_speed() -> Measurement:
    steps, layers, experts = 10_000, 16, 64
    rng = np.random.default_rng(0)
    routing = {f"layers.{i}": rng.random((steps, experts)) for i in range(layers)}
    importance = {f"layers.{i}": rng.random((steps, experts)) for i in range(layers)}
    recording = Recording.from_arrays(routing, importance)
    settings = config(warmup_steps=200, growth_interval=200, growth_end=2200)
    value = seconds(lambda: replay(recording, settings), 3)
    return Measurement(
        f"replay of {steps:,} steps, {layers} x {experts}", f"{value:.2f} s", "< 5 s", value < 5.0
    )


def recording_cost() -> Measurement:
    """Extra time per step for recording, at the size of OLMoE-1B-7B (16 x 64)."""
    settings = config(warmup_steps=200, growth_interval=200, growth_end=2200)
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(3):
            for recorded in (True, False):
                run = Run(16, 64, settings)
                started = time.perf_counter()
                if recorded:
                    run.engine.record_to(Path(folder) / str(repeat))
                for _ in range(1024):
                    run.step()
                run.engine.record_to(None)
                times[recorded].append((time.perf_counter() - started) / 1024)
    extra = (statistics.median(times[True]) - statistics.median(times[False])) * 1e3
    return Measurement(
        "recording, extra time per step, 16 x 64, writing included",
        f"{extra:.2f} ms",
        "< 1 % of a step: < 1 ms for steps of 0.1 s",
        extra < 1.0,
    )


def against_adalora() -> list[Measurement]:
    """Both allocators on 16 x 64 x 3 adapted matrices, alternating in this process."""
    try:
        ours, theirs = _ours(), _adalora()
    except ModuleNotFoundError as error:
        return [Measurement(f"PEFT's AdaLoRA: skipped, {error.name} is not installed", "-")]
    pairs = [(seconds(ours, 20), seconds(theirs, 1)) for _ in range(7)]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(two / one for one, two in pairs)
    return [
        Measurement("allocation step, 16 x 64 x 3 matrices: drlora", f"{mine * 1e3:.2f} ms"),
        Measurement("the same: PEFT AdaLoRA update_and_allocate", f"{other * 1e3:.0f} ms"),
        Measurement("PEFT's time / ours (median of pairs)", f"{ratio:.0f}", ">= 200", ratio >= 200),
    ]


def _ours() -> Callable[[], object]:
    """Every step has an event, like AdaLoRA with delta_t = 1 between tinit and tfinal."""
    state = {"run": Run(16, 64, config(warmup_steps=0, growth_end=2000, policy="greedy"))}

    def step() -> None:
        if state["run"].engine.step_count == 2000:
            state["run"] = Run(16, 64, state["run"].engine.config)
        state["run"].step()

    return step


def _adalora() -> Callable[[], object]:
    import torch
    from peft import AdaLoraConfig, get_peft_model

    torch.set_num_threads(1)

    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(self, name, torch.nn.Linear(16, 16, bias=False))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(Expert() for _ in range(16 * 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    settings = AdaLoraConfig(
        init_r=16, target_r=8, tinit=2, tfinal=10, deltaT=1, total_step=10_000,
        target_modules=["gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(Model(), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    state = {"step": 10}

    def step() -> None:
        state["step"] += 1
        model.base_model.update_and_allocate(state["step"])

    return step


def measure() -> list[Measurement]:
    events = [
        ("greedy", "layer", 3.0),
        ("rescored", "layer", 5.0),
        ("greedy", "global", 5.0),
        ("rescored", "global", 5.0),
    ]
    measurements: list[Callable[[], list[Measurement]]] = [
        lambda: [statistics_of_a_step(), statistics_in_one_call()],
        lambda: [growth_event(*which) for which in events],
        lambda: [a_million_experts()],
        lambda: [one_wide_layer()],
        lambda: [replay_speed()],
        lambda: [recording_cost()],
        against_adalora,
    ]
    found = []
    for run in measurements:
        gc.collect()
        found += run()
        print(found[-1].what, found[-1].measured, flush=True)
    return found


def main() -> None:
    """Measure, print and write the table."""
    rows = [measurement.row() for measurement in measure()]
    about = "Medians; the allocators run on one core."
    table = report.Table("", "", ["What", "Measured", "Goal", "Met"], rows)
    report.write("core_speed", "Speed of drlora_core", about, [table])


if __name__ == "__main__":
    main()
