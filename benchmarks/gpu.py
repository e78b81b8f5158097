"""Correctness, waiting, time and memory of training steps on a GPU.

    python -m benchmarks.gpu                        # under four minutes on an H100
    python -m benchmarks.gpu --device cpu --tiny    # all of it, small, anywhere

It needs torch >= 2.11, transformers >= 5.17, numpy, pydantic and safetensors; with peft and
bitsandbytes it compares with PEFT's LoRA and runs on 4-bit experts. Exit status 1 if a result is
wrong, or a step waits; goals of time and memory are reported only.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402 - also found when this file is run by its path
from benchmarks.methods import Training  # noqa: E402
from benchmarks.on_device import decisions, event, methods, page, parity, rounds, waiting  # noqa: E402
from benchmarks.on_device.shapes import SHAPES, Case, Shape  # noqa: E402

PARTS = ("parity", "waiting", "steps", "event", "decisions", "others")
GOALS = {4096: (1.10, 0.35), 16384: (1.06, 0.35)}
"""By tokens: growing over frozen, growing over PEFT."""
GROWING_OVER_STATIC, NF4_OVER_FROZEN, MEMORY_OVER_PEFT, EVENT = 1.02, 1.35, 0.15, 20.0
COLUMNS = ["model", "tokens", "method", "ms", "/ frozen", "host ms", "tokens / s", "peak, MiB",
           "state, MiB"]  # fmt: skip


class Run:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.tiny: bool = options.tiny
        self.dtype = torch.bfloat16  # Transformers' own experts compile in no other
        self.layers = 2 if self.tiny else 4
        self.tokens: list[int] = [64] if self.tiny else options.tokens
        self.shapes = {name: SHAPES[name] for name in options.shapes}
        if self.tiny:
            self.shapes = {name: shape.tiny() for name, shape in self.shapes.items()}
        self.tables: list[report.Table] = []
        self.goals: list[list[str]] = []
        self.wrong = 0

    def failed(self, part: str) -> None:
        """Say on the page that a part ended in an error, which is printed."""
        traceback.print_exc()
        self.wrong += 1
        last = str(sys.exc_info()[1]).strip().splitlines()[-1:]
        self.tables.append(report.Table(f"{part}: failed", "", ["error"], [last or ["unknown"]]))

    def goal(self, what: str, limit: float, found: float, shown: str = "") -> None:
        """Note a goal and whether it is met."""
        met = "yes" if found <= limit else f"no, by {found - limit:.3f}"
        self.goals.append([what, f"<= {limit:g}", shown or f"{found:.3f}", met])

    def parity(self) -> None:
        """(a) Both kernels against float64."""
        found = list(parity.compare(self.device, tiny=self.tiny))
        self.wrong += sum(not each.fine for each in found)
        rows = [[d.case, f"{d.error:.1e}", d.where, f"{d.bound:.1e}", "yes" if d.fine else "NO"]
                for d in found]  # fmt: skip
        about = "Relative error by norm, against float64 on the CPU; the worst of all values."
        columns = ["kernel", "error", "of", "bound", "within"]
        self.tables.append(report.Table("Parity", about, columns, rows))

    def waiting(self) -> None:
        """(b) Steps that may not wait."""
        case = Case(next(iter(self.shapes.values())), 64, 2, self.device, self.dtype)
        found = {
            f"blocks, {name}": waiting.of_blocks(
                methods.drlora(case, growing=name == methods.GROWING), self.device
            )
            for name in (methods.STATIC, methods.GROWING)
        }
        found["a whole model"] = waiting.of_model(self.device, self.dtype)
        rows = []
        for name, (own, others) in found.items():
            self.wrong += len(own)
            short = [", ".join(w.rsplit("/", 1)[-1] for w in each) for each in (own, others)]
            rows.append([name, *(each or "none" for each in short)])
        about = "Places at which a step between two growth events waits for the device."
        self.tables.append(
            report.Table("Waiting", about, ["steps of", "in drlora", "elsewhere"], rows)
        )

    def steps(self) -> None:
        """(c) Blocks of real models."""
        rows: list[list[str]] = []
        self.tables.append(report.Table("Steps", "", COLUMNS, rows))
        for name, shape in self.shapes.items():
            for tokens in self.tokens:
                measured = self.measure(shape, tokens, methods.main_methods())
                rows += self.rows(name, tokens, measured)
                self.step_goals(name, tokens, measured)

    def others(self) -> None:
        """(e) Compiled and checkpointed."""
        name, shape = next(iter(self.shapes.items()))
        tokens = self.tokens[0]
        measured = self.measure(shape, tokens, methods.other_methods())
        rows = self.rows(name, tokens, measured)
        for plain, ours in ((methods.FROZEN_COMPILED, methods.COMPILED),
                            (methods.FROZEN_CHECKPOINTED, methods.CHECKPOINTED)):  # fmt: skip
            ratio = measured.ratio(ours, plain)
            rows.append([name, str(tokens), f"{ours} / {plain}", "", str(ratio), "", "", "", ""])
        self.tables.append(report.Table("Compiled and checkpointed", "", COLUMNS, rows))

    def decisions(self) -> None:
        """(d) The same fine-tune on the CPU and on the device."""
        steps = 6 if self.tiny else 60
        here = decisions.train(torch.device("cpu"), steps)
        rows = []
        for kernel in ("ragged", "grouped"):
            there = decisions.train(self.device, steps, kernel)
            equal, count = decisions.count_equal(here, there)
            self.wrong += equal < count
            off = max(abs(a - b) for a, b in zip(here.losses, there.losses, strict=True))
            rows.append([kernel, f"{equal} of {count}", f"{off:.1e}"])
        about = f"The shipped model, {steps} steps in float32, on the CPU and on the device."
        columns = ["kernel", "events with equal decisions", "largest difference of a loss"]
        self.tables.append(report.Table("Decisions", about, columns, rows))

    def event(self) -> None:
        """Time of a growth event."""
        shape = self.shapes.get("Qwen3-30B-A3B", next(iter(self.shapes.values())))
        layers = 2 if self.tiny else 48
        found = event.milliseconds(shape, layers, self.device, self.dtype)
        self.goal(f"growth event, {layers} layers x {shape.experts} experts, ms", EVENT, found)

    def measure(
        self, shape: Shape, tokens: int, builders: Mapping[str, Callable[[Case], Training]]
    ) -> rounds.Measured:
        """All methods of one case."""
        case = Case(shape, tokens, self.layers, self.device, self.dtype)
        built = {name: builder(case) for name, builder in builders.items()}
        count = (2, 1) if self.tiny else (5, 3)
        measured = rounds.interleave(built, self.device, *count)
        built.clear()
        gc.collect()  # adapters and models refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return measured

    def rows(self, name: str, tokens: int, measured: rounds.Measured) -> list[list[str]]:
        """One line per method."""
        return [
            [name, f"{tokens:,}", method, f"{measured.milliseconds(method):.2f}",
             str(measured.ratio(method, methods.FROZEN)), f"{measured.hosts[method] * 1e3:.1f}",
             f"{tokens / measured.milliseconds(method) * 1e3:,.0f}",
             f"{measured.peaks[method] / 2**20:,.0f}", f"{measured.states[method] / 2**20:,.0f}"]
            for method in measured.seconds
        ]  # fmt: skip

    def step_goals(self, name: str, tokens: int, measured: rounds.Measured) -> None:
        """Compare with the goals, which are for a GPU and sizes of real models."""
        if self.tiny or self.device.type != "cuda":
            return
        over_frozen, over_peft = GOALS.get(tokens, GOALS[4096])
        where, growing = f"{name}, {tokens:,} tokens", methods.GROWING
        for what, limit, over, under in (
            ("growing / frozen", over_frozen, growing, methods.FROZEN),
            ("growing / static", GROWING_OVER_STATIC, growing, methods.STATIC),
            ("growing / PEFT", over_peft, growing, methods.PEFT),
            ("growing on NF4 / frozen bf16", NF4_OVER_FROZEN, methods.NF4, methods.FROZEN),
        ):
            if {over, under} <= measured.seconds.keys():
                ratio = measured.ratio(over, under)
                self.goal(f"{what}, {where}", limit, ratio.median, str(ratio))
        if methods.PEFT in measured.seconds and measured.peaks[methods.PEFT]:
            base = measured.peaks[methods.FROZEN]
            ours, theirs = (measured.peaks[m] + measured.states[m] - base
                            for m in (growing, methods.PEFT))  # fmt: skip
            self.goal(f"memory above frozen, ours / PEFT's, {where}", MEMORY_OVER_PEFT,
                      ours / theirs)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    known = list(SHAPES)
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--shapes", nargs="+", choices=known, default=known, metavar="MODEL",
                        help=f"of {', '.join(known)}")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the page")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny runs all parts without one")
    run, started = Run(options), time.perf_counter()
    for part in options.parts:
        try:
            getattr(run, part)()
        except Exception:  # what was measured before is kept
            run.failed(part)
        seconds = time.perf_counter() - started
        goals = report.Table("Goals", "", ["what", "goal", "measured", "met"], run.goals)
        path = page.write(run.device, [goals, *run.tables], options.output, seconds, run.tiny)
        print(f"{part}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(path.read_text())
    print(f"written to {path}; {run.wrong} results are wrong", file=sys.stderr)
    return 1 if run.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
