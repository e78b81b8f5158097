"""Measure whether the experts of a small model specialise.

Rank allocation can only beat uniform ranks if experts differ. Three measures on held-out text:
mutual information of the kind of text and the chosen expert, against shuffled labels; total
variation between the routing of each kind and the average; and the increase of the loss of each
kind without the experts that are specific to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from corpus import collect, digest
from numpy.typing import NDArray
from pretrain import held_out_rows, losses
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM
from vocabulary import encode

Floats = NDArray[np.float64]


@torch.no_grad()
def row_counts(model: OlmoeForCausalLM, rows: torch.Tensor) -> NDArray[np.int64]:
    """Number of choices of each expert by each row, (row, layer, expert)."""
    config = model.config
    found = np.zeros((len(rows), config.num_hidden_layers, config.num_experts), dtype=np.int64)
    start = 0
    for batch in rows.split(16):
        logits = model(input_ids=batch, output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            chosen = scores.topk(config.num_experts_per_tok, dim=-1).indices
            for row, indices in enumerate(chosen.view(len(batch), -1)):
                counts = torch.bincount(indices, minlength=config.num_experts)
                found[start + row, layer] = counts.numpy()
        start += len(batch)
    return found


def frequencies(counts: NDArray[np.int64], labels: NDArray[np.int64]) -> Floats:
    """Share of choices of each expert by kind, (kind, layer, expert)."""
    summed = np.stack([counts[labels == kind].sum(0) for kind in np.unique(labels)]).astype(float)
    shares: Floats = summed / summed.sum(-1, keepdims=True)
    return shares


def mutual_information(shares: Floats) -> Floats:
    """Mutual information of kind and chosen expert in bits, by layer."""
    average = shares.mean(0, keepdims=True)
    ratio = np.divide(shares, average, out=np.ones_like(shares), where=shares > 0)
    bits: Floats = (shares * np.log2(ratio)).sum(-1).mean(0)
    return bits


def total_variation(shares: Floats) -> Floats:
    """Distance of the routing of each kind to the average, (kind, layer)."""
    distance: Floats = 0.5 * np.abs(shares - shares.mean(0, keepdims=True)).sum(-1)
    return distance


@contextmanager
def without_experts(model: OlmoeForCausalLM, removed: list[tuple[int, int]]) -> Iterator[None]:
    """Within the context, the routers cannot choose the removed experts."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        gone = torch.tensor([e for at, e in removed if at == number], dtype=torch.long)
        gate = layer.mlp.gate

        def choose(gate: Any, _: Any, output: Any, gone: torch.Tensor = gone) -> Any:
            probabilities = output[0].index_fill(-1, gone, -torch.inf).softmax(-1)
            weights, chosen = probabilities.topk(gate.top_k, dim=-1)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return output[0], weights, chosen

        if len(gone):
            handles.append(gate.register_forward_hook(choose))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_specific(shares: Floats, kind: int, count: int) -> list[tuple[int, int]]:
    """The (layer, expert) pairs that a kind uses most, relative to the average of other kinds."""
    others = np.delete(shares, kind, axis=0).mean(0)
    order = np.argsort(-(shares[kind] - others), axis=None, kind="stable")[:count]
    layers, experts = np.unravel_index(order, others.shape)
    return [(int(layer), int(expert)) for layer, expert in zip(layers, experts, strict=True)]


def ablate(
    model: OlmoeForCausalLM,
    rows: dict[str, torch.Tensor],
    shares: Floats,
    count: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Increase of all losses without the specific experts of each kind, one kind at a time."""
    base = losses(model, rows)
    rises, removed = {}, {}
    for number, kind in enumerate(rows):
        removed[kind] = most_specific(shares, number, count)
        with without_experts(model, removed[kind]):
            rises[kind] = {k: v - base[k] for k, v in losses(model, rows).items()}
    draws = []
    everyone = [(layer, e) for layer in range(shares.shape[1]) for e in range(shares.shape[2])]
    for _ in range(5):
        picked = rng.choice(len(everyone), size=count, replace=False)
        with without_experts(model, [everyone[i] for i in picked]):
            draws.append({k: v - base[k] for k, v in losses(model, rows).items()})
    random = {k: float(np.mean([draw[k] for draw in draws])) for k in rows}
    return {"count": count, "base": base, "removed": removed, "rise": rises, "random_rise": random}


def measure(
    model: OlmoeForCausalLM, rows: dict[str, torch.Tensor], count: int, seed: int
) -> dict[str, Any]:
    """All figures."""
    rng = np.random.default_rng(seed)
    counts = [row_counts(model, batch) for batch in rows.values()]
    labels = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
    stacked = np.concatenate(counts)
    shares = frequencies(stacked, labels)
    shuffled = [
        mutual_information(frequencies(stacked, rng.permutation(labels))) for _ in range(100)
    ]
    variation = total_variation(shares)
    return {
        "kinds": list(rows),
        "rows_per_kind": {k: len(batch) for k, batch in rows.items()},
        "mutual_information_bits": mutual_information(shares).tolist(),
        "shuffled_bits_mean": np.mean(shuffled, axis=0).tolist(),
        "shuffled_bits_max": np.max(shuffled, axis=0).tolist(),
        "most_possible_bits": float(np.log2(len(rows))),
        "total_variation": dict(zip(rows, variation.mean(1).tolist(), strict=True)),
        "smallest_share": float(shares.mean(0).min()),
        "largest_share": float(shares.mean(0).max()),
        "ablation": ablate(model, rows, shares, count, rng),
        "frequencies": dict(zip(rows, shares.round(4).tolist(), strict=True)),
    }


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path(
        "drlora_torch/embedded/model"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows of each kind.")] = 32,
    remove: Annotated[int, typer.Option(min=1, help="Experts removed in the ablation.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Measure the specialisation of the experts on held-out text; write specialisation.json."""
    torch.set_num_threads(threads)
    training = json.loads((model / "training.json").read_text())
    kinds = collect(training["seed"])
    if digest(kinds) != training["corpus_sha256"]:
        typer.echo("Warning: this installation's text differs from the model's corpus.", err=True)
    tokenizer = AutoTokenizer.from_pretrained(training.get("tokenizer_from") or model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = {
        k.name: held_out_rows(encode(tokenizer, [d.text for d in k.held_out]), rows) for k in kinds
    }
    proof = measure(loaded.eval(), text, remove, training["seed"])
    (model / "specialisation.json").write_text(json.dumps(proof) + "\n")
    for layer, bits in enumerate(proof["mutual_information_bits"]):
        typer.echo(
            f"layer {layer}: {bits:.3f} bits (shuffled {proof['shuffled_bits_mean'][layer]:.3f})"
        )
    for kind, rise in proof["ablation"]["rise"].items():
        others = np.mean([v for k, v in rise.items() if k != kind])
        typer.echo(f"without the experts of {kind}: own {rise[kind]:+.3f}, others {others:+.3f}")


if __name__ == "__main__":
    typer.run(main)
