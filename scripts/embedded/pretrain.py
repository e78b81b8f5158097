"""Pretrain the embedded default model: a small OLMoE whose experts specialise by kind of text.

The model is part of the package, so ``drlora finetune`` works without arguments and without a
download. It must be small, and its experts must specialise. So every row of a batch is of one kind,
kinds are sampled evenly, and the balancing loss is only strong enough to keep all experts in use.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from corpus import Kind, collect, digest
from families import Family, make_model
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel
from vocabulary import CONTEXT, encode, train_tokenizer


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    minutes: float | None
    rows_per_kind: int
    learning_rate: float
    aux: float
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0

    def progress(self, step: int, seconds: float) -> float:
        """Share of the training that is done, by time if ``minutes`` is given."""
        return step / self.steps if self.minutes is None else seconds / (60 * self.minutes)

    def rate(self, progress: float) -> float:
        """Learning rate: linear warmup, then cosine decay to a twentieth."""
        if progress < self.warmup:
            return self.learning_rate * (0.02 + 0.98 * progress / self.warmup)
        done = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * done))))


def held_out_rows(stream: torch.Tensor, rows: int) -> torch.Tensor:
    """Up to ``rows`` rows, evenly spaced over a stream; deterministic."""
    count = min(rows, len(stream) // CONTEXT)
    starts = np.linspace(0, len(stream) - CONTEXT, count).astype(int)
    return torch.stack([stream[s : s + CONTEXT] for s in starts])


@torch.no_grad()
def losses(model: PreTrainedModel, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean loss per token of each kind, without the balancing loss."""
    model.eval()
    found = {
        kind: float(np.mean([model(input_ids=b, labels=b).loss.item() for b in batch.split(16)]))
        for kind, batch in rows.items()
    }
    model.train()
    return found


def unigram(train: torch.Tensor, rows: torch.Tensor, vocabulary: int) -> float:
    """Loss of a unigram model of the training text."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[rows[:, 1:]].mean())


def imbalance(routing: torch.Tensor, chosen: int) -> torch.Tensor:
    """Balancing loss of router logits (layer, token, expert): 1 if experts are used equally.

    The balancing loss of Transformers averages over layers first, so an expert can be unused in one
    layer if the experts with the same index in other layers compensate. This one is per layer.
    """
    probabilities = routing.softmax(-1)
    picked = torch.zeros_like(probabilities).scatter_(-1, routing.topk(chosen, -1).indices, 1.0)
    per_layer = (picked.mean(1) / chosen * probabilities.mean(1)).sum(-1) * routing.shape[-1]
    return per_layer.mean()


def optimizer_for(model: PreTrainedModel, plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices, but not for norms and the (tied) embedding."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.dim() < 2 or "embed" in name else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))


def train(
    model: PreTrainedModel,
    streams: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor],
    plan: Plan,
    seed: int,
) -> tuple[list[dict[str, object]], int, float]:
    """Train; return the loss curve, the number of steps and the seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer_for(model, plan)
    curve: list[dict[str, object]] = []
    began, step, progress = time.monotonic(), 0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("pretraining", total=1.0)
        recent: list[float] = []
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(progress)
            loss = _step(model, optimizer, _batch(streams, plan.rows_per_kind, generator), plan)
            recent.append(loss)
            step += 1
            progress = plan.progress(step, time.monotonic() - began)
            bar.update(task, completed=progress, description=f"step {step} loss {loss:.3f}")
            if step % 200 == 0 or progress >= 1:
                held_out = losses(model, {kind: r[:8] for kind, r in rows.items()})
                curve.append({"step": step, "train": float(np.mean(recent)), "held_out": held_out})
                mean = float(np.mean(list(held_out.values())))
                bar.console.print(f"step {step}: train {np.mean(recent):.3f}, held out {mean:.3f}")
                recent = []
    return curve, step, time.monotonic() - began


def _batch(streams: dict[str, torch.Tensor], rows: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the same number of rows of each kind."""
    drawn = []
    for stream in streams.values():
        starts = torch.randint(len(stream) - CONTEXT, (rows,), generator=generator).tolist()
        drawn += [stream[s : s + CONTEXT] for s in starts]
    return torch.stack(drawn)


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: torch.Tensor, plan: Plan
) -> float:
    """Take one optimizer step; return the loss without the balancing loss."""
    output = model.model(input_ids=batch, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    routing = torch.stack(list(output.router_logits))
    (loss + plan.aux * imbalance(routing, model.config.num_experts_per_tok)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def results(
    model: PreTrainedModel,
    kinds: list[Kind],
    streams: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor],
) -> dict[str, object]:
    """Final figures, with the stored weights."""
    return {
        "parameters": model.num_parameters(),
        "corpus_sha256": digest(kinds),
        "kinds": {k.name: k.sizes() | {"train_tokens": len(streams[k.name])} for k in kinds},
        "unigram": {k: unigram(streams[k], rows[k], model.config.vocab_size) for k in streams},
        "held_out": losses(model, rows),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main(
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path(
        "drlora_torch/embedded/model"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the corpus split, weights and batches.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1500,
    minutes: Annotated[
        float | None,
        typer.Option(help="Train for this long instead; not reproducible."),
    ] = None,
    rows_per_kind: Annotated[int, typer.Option(min=1, help="Rows per kind in a batch.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 4e-3,
    aux: Annotated[float, typer.Option(help="Weight of the balancing loss.")] = 0.02,
    vocabulary: Annotated[int, typer.Option(min=300, help="Size of the vocabulary.")] = 1536,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    family: Annotated[Family, typer.Option(help="Architecture of the model.")] = Family.olmoe,
    tokenizer_from: Annotated[
        Path | None, typer.Option(help="Use the tokenizer of this model instead of training one.")
    ] = None,
) -> None:
    """Pretrain the embedded model on text of this Python installation; about 15 minutes.

    Writes the model (bfloat16), the tokenizer if it was trained here, and training.json with the
    figures of the run.
    """
    torch.set_num_threads(threads)
    plan = Plan(steps, minutes, rows_per_kind, learning_rate, aux)
    kinds = collect(seed)
    if tokenizer_from is None:
        tokenizer = train_tokenizer(kinds, vocabulary)
        tokenizer.save_pretrained(output)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    streams = {k.name: encode(tokenizer, [d.text for d in k.train]) for k in kinds}
    rows = {
        k.name: held_out_rows(encode(tokenizer, [d.text for d in k.held_out]), 32) for k in kinds
    }
    model = make_model(tokenizer, seed, aux, family)
    curve, taken, seconds = train(model, streams, rows, plan, seed)
    model.to(torch.bfloat16).save_pretrained(output)
    figures = {
        "family": family.value,
        "tokenizer_from": None if tokenizer_from is None else tokenizer_from.as_posix(),
        "seed": seed,
        "steps": taken,
        "seconds": round(seconds, 1),
        "tokens": taken * rows_per_kind * len(kinds) * CONTEXT,
        "rows_per_kind": rows_per_kind,
        "learning_rate": learning_rate,
        "aux": aux,
        "machine": f"{platform.machine()}, {threads} CPU threads",
        "curve": curve,
    }
    figures |= results(model.float(), kinds, streams, rows)
    (output / "training.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
