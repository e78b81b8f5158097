"""Results of a run, and the tables that show them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from drlora_core.cli.console import blocks
from drlora_core.cli.tables import show_table
from drlora_torch.adapter import Adapter
from drlora_torch.finetune import folder
from drlora_torch.finetune.next_steps import next_steps
from drlora_torch.finetune.watch.meter import Meter

MOST_BLOCKS = 64  # experts that fit on a line


class RunResult(BaseModel):
    """Figures of one finished training.

    Speed, time and memory are those of the process that finished it, without what a process that
    was stopped earlier did.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    """Name of the policy."""
    loss_before: float
    """Held-out loss of the base model, in nats per token: the Trainer's mean over batches."""
    loss_after: float
    """Held-out loss after the training, likewise. ``drlora evaluate`` has the mean over tokens."""
    tokens_per_second: float | None
    """Training tokens per second, without padding; None if there was nothing left to train."""
    seconds: float
    """Duration of the training alone."""
    peak_memory_mb: float | None
    """Peak memory during the training, in MiB; None if there was nothing left to train."""
    memory_source: str
    """What ``peak_memory_mb`` measures: ``GPU``, the most memory that torch allocated there, or
    ``process, sampled``, the largest resident memory of the process after a step."""
    budget: int
    """Total rank allowed."""
    total_rank: int
    skipped_steps: int
    """Optimizer steps whose statistics were not finite, so that they were ignored."""
    ranks: dict[str, list[int]]
    """Final rank of each expert, by layer."""
    files: list[str]


def collect(
    method: str, adapter: Adapter, meter: Meter, before: float, after: float, output: Path
) -> RunResult:
    """Put the figures of a training together.

    Args:
        method: name of the policy.
        adapter: as it is after the training.
        meter: that measured it.
        before: held-out loss of the base model.
        after: held-out loss after the training.
        output: folder that its files are in.
    """
    ranks = {name: layer.tolist() for name, layer in adapter.ranks().items()}
    return RunResult(
        method=method,
        loss_before=before,
        loss_after=after,
        tokens_per_second=meter.tokens / meter.seconds if meter.tokens else None,
        seconds=meter.seconds,
        peak_memory_mb=meter.peak_memory_mb,
        memory_source=meter.memory_source,
        budget=sum(adapter.engine.budget(name) for name in ranks),
        total_rank=sum(map(sum, ranks.values())),
        skipped_steps=adapter.skipped_steps,
        ranks=ranks,
        files=[
            str(output / name)
            for name in (folder.ADAPTER, folder.METRICS, folder.RECORDING)
            if (output / name).exists()
        ],
    )


def trained_parameters(adapter: Adapter) -> str:
    """Say how many parameters are trained: of the experts' LoRA and of everything else."""
    experts = sum(parameter.numel() for parameter in adapter.lora_parameters())
    routers = sum(parameter.numel() for parameter in adapter.router_parameters().values())
    rest = sum(parameter.numel() for parameter in adapter.parameters()) - experts - routers
    frozen = sum(p.numel() for p in adapter.model.parameters() if not p.requires_grad)
    parts = [f"{experts:,} in the LoRA of the experts"]
    parts += [f"{routers:,} in routers"] if routers else []
    parts += [f"{rest:,} in the rest of the model"] if rest else []
    total = experts + routers + rest
    share = 100 * total / (total + frozen)
    return f"trained parameters: {total:,} ({share:.2f} % of all): {', '.join(parts)}"


def show(console: Console, results: list[RunResult], output: Path, page: Path | None) -> None:
    """Print the tables of a finished run, and what can be done with it."""
    _show_summary(console, results)
    for result in results:
        if len({rank for ranks in result.ranks.values() for rank in ranks}) > 1:
            _show_ranks(console, result)
    console.print(f"Files in {output}:", markup=False, highlight=False, soft_wrap=True)
    pages = [] if page is None else [str(page)]
    for name in [*pages, *(name for result in results for name in result.files)]:
        console.print(f"  {name}", markup=False, highlight=False, soft_wrap=True)
    console.print(next_steps(output), highlight=False, soft_wrap=True, markup=False)


def _show_summary(console: Console, results: list[RunResult]) -> None:
    figures = {
        "held-out loss before": [f"{r.loss_before:.4f}" for r in results],
        "held-out loss after": [f"{r.loss_after:.4f}" for r in results],
        "total rank / budget": [f"{r.total_rank} / {r.budget}" for r in results],
        "tokens per second": [_number(r.tokens_per_second) for r in results],
        "training seconds": [f"{r.seconds:.1f}" for r in results],
        f"peak memory in MiB, {results[0].memory_source}": [
            _number(r.peak_memory_mb) for r in results
        ],
    }
    if any(r.skipped_steps for r in results):
        figures["steps without statistics"] = [str(r.skipped_steps) for r in results]
    methods = [method_name(result.method) for result in results]
    rows = [
        {"": label, **dict(zip(methods, values, strict=True))} for label, values in figures.items()
    ]
    show_table("Fine-tuning", rows, figures=methods, console=console)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _show_ranks(console: Console, result: RunResult) -> None:
    highest = max(max(ranks) for ranks in result.ranks.values())
    heights = blocks(console)
    rows = []
    names = _distinct_parts(list(result.ranks))
    for name, ranks in zip(names, result.ranks.values(), strict=True):
        top = sorted(range(len(ranks)), key=lambda expert: -ranks[expert])[:3]
        rows.append(
            {
                "layer": name,
                "min": min(ranks),
                "mean": f"{sum(ranks) / len(ranks):.2f}",
                "max": max(ranks),
                "top experts": ", ".join(f"{expert} ({ranks[expert]})" for expert in top),
                "rank of each expert": _bars(ranks, highest, heights),
            }
        )
    title = f"Ranks per layer, {method_name(result.method)}"
    show_table(title, rows, figures=["mean"], spare=["top experts", "mean"], console=console)


def method_name(policy: str) -> str:
    """Return the name of a method as tables show it."""
    return "uniform LoRA" if policy == "uniform" else f"DR-LoRA, {policy}"


def _distinct_parts(names: list[str]) -> list[str]:
    """Cut the end that all dotted names share: ``model.layers.0`` is enough."""
    parts = [name.split(".") for name in names]
    while len({tuple(part[-1:]) for part in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def _bars(ranks: list[int], highest: int, heights: str) -> str:
    if len(ranks) > MOST_BLOCKS:
        return f"{len(ranks)} experts"
    return "".join(heights[(len(heights) - 1) * rank // highest] for rank in ranks)
