"""The controlled model: a small OLMoE in which the relevant experts are known by construction.

Each of eight operations (``tasks.controlled``) is assigned two of sixteen experts in every layer.
Pretraining adds the cross-entropy between the router probabilities and this assignment to the loss.
After fine-tuning on new tables, final ranks can be compared with ``relevance``, the amount that
each expert had to learn.

    python -m benchmarks.quality.controlled     # pretrain it again
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch.nn import functional
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from benchmarks.quality.models import SHIPPED
from benchmarks.quality.tasks.controlled import DEMANDS, OPERATIONS, draw_row, known_tables

LAYERS, EXPERTS, CHOSEN = 3, 16, 2
LEARNING_RATE = 3e-3
ROUTING_WEIGHT = 0.5
"""Weight of the routing loss."""


def assignment() -> dict[str, dict[str, list[int]]]:
    """Experts of each operation by layer; the assignment differs between layers."""
    rng = np.random.default_rng(73)
    found = {}
    for layer in range(LAYERS):
        pairs = rng.permutation(EXPERTS).reshape(len(OPERATIONS), CHOSEN)
        found[f"model.layers.{layer}.mlp.experts"] = {
            name: sorted(pair.tolist()) for name, pair in zip(OPERATIONS, pairs, strict=True)
        }
    return found


def relevance(model_name: str, task_name: str) -> dict[str, list[float]]:
    """Share of the new knowledge of a task that each expert has to learn, by layer.

    Proportional to the share of rows of its operation times the share of new letters of the
    operation; sums to 1 over a layer. The two experts of an operation are equally relevant.

    Raises:
        ValueError: the relevance is unknown for this model and task.

    Example:
        >>> found = relevance("controlled", "controlled_share")
        >>> [len(layer) for layer in found.values()]
        [16, 16, 16]
    """
    if model_name != "controlled" or task_name not in DEMANDS:
        raise ValueError(
            "relevance is known for the model 'controlled' on the tasks "
            f"{', '.join(DEMANDS)}; got {model_name!r} on {task_name!r}"
        )
    by_operation = DEMANDS[task_name].relevance
    found = {}
    for layer, experts in assignment().items():
        values = [0.0] * EXPERTS
        for operation, owned in experts.items():
            for expert in owned:
                values[expert] = by_operation[operation] / CHOSEN
        found[layer] = values
    return found


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> OlmoeForCausalLM:
    """Initialise the model."""
    torch.manual_seed(seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            norm_topk_prob=True,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def draw_batch(
    tokenizer: PreTrainedTokenizerBase, rows_each: int, rng: np.random.Generator
) -> tuple[torch.Tensor, int]:
    """Draw the same number of rows of each operation, ordered by operation.

    Returns:
        Token ids [rows, tokens], and the number of prompt tokens, which is the same in all rows.
    """
    tables, length = known_tables(), int(rng.integers(3, 6))
    rows = [draw_row(tables, name, length, rng) for name in OPERATIONS for _ in range(rows_each)]
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    return torch.tensor(tokenizer(texts)["input_ids"]), len(
        tokenizer(rows[0]["prompt"])["input_ids"]
    )


def routing_target(rows_each: int, tokens: int) -> torch.Tensor:
    """Target probabilities of the routers, [layer, token, expert]."""
    target = torch.zeros(LAYERS, len(OPERATIONS), EXPERTS)
    for layer, experts in enumerate(assignment().values()):
        for number, owned in enumerate(experts.values()):
            target[layer, number, owned] = 1 / CHOSEN
    return target.repeat_interleave(rows_each * tokens, dim=1)


def losses(model: OlmoeForCausalLM, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, ...]:
    """Loss of the completions, and loss of the routing."""
    output = model(input_ids=ids, output_router_logits=True)
    logits, labels = output.logits[:, prompt - 1 : -1], ids[:, prompt:]
    text = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    target = routing_target(len(ids) // len(OPERATIONS), ids.shape[1])
    logs = torch.stack(list(output.router_logits)).log_softmax(-1)
    return text, -(target * logs).sum(-1).mean()


@torch.no_grad()
def assigned_mass(model: OlmoeForCausalLM, ids: torch.Tensor) -> list[float]:
    """Share of the routing weight that goes to the assigned experts, by layer."""
    logits = torch.stack(list(model(input_ids=ids, output_router_logits=True).router_logits))
    weights = logits.softmax(-1)
    chosen = torch.zeros_like(weights).scatter_(-1, weights.topk(CHOSEN, -1).indices, 1.0) * weights
    wanted = routing_target(len(ids) // len(OPERATIONS), ids.shape[1]) > 0
    return ((chosen * wanted).sum(-1) / chosen.sum(-1)).mean(-1).tolist()


def pretrain(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int
) -> None:
    """Train on the known tables."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        text, routing = losses(model, *draw_batch(tokenizer, 8, rng))
        (text + ROUTING_WEIGHT * routing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            typer.echo(f"step {step}: text {text.item():.3f}, routing {routing.item():.3f}")


def card(figures: dict[str, Any]) -> str:
    """The model card, from measured figures."""
    mass = ", ".join(f"{value:.2%}" for value in figures["assigned_mass"])
    owned = "\n".join(
        f"| {operation} | "
        + " | ".join(" and ".join(map(str, layer[operation])) for layer in assignment().values())
        + " |"
        for operation in OPERATIONS
    )
    minutes = f"{figures['seconds'] / 60:.1f}"
    return f"""# The controlled model

An OLMoE of {figures["parameters"]:,} parameters ({LAYERS} layers of width 64 with {EXPERTS} experts
of width 32, {CHOSEN} per token), stored in bfloat16, in which the experts that serve an operation
are known by construction. It serves to compare the final rank of each expert with what the expert
had to learn, and it knows nothing but eight tables of letters. It uses the tokenizer of the
embedded model. It was pretrained ({minutes} minutes on one thread of a shared CPU) by

    python -m benchmarks.quality.controlled --steps {figures["steps"]} --seed {figures["seed"]}

On new rows of the tables it knows, with the stored weights: loss {figures["loss"]:.4f} nats per
completion token; share of the routing weight that goes to the assigned experts, by layer: {mass}.
The experts of each operation:

| operation | layer 0 | layer 1 | layer 2 |
| --- | ---: | ---: | ---: |
{owned}
"""


def main(
    output: Annotated[Path, typer.Option(help="Output folder.")] = SHIPPED["controlled"],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1200,
    seed: Annotated[int, typer.Option(help="Seed of the weights and batches.")] = 0,
) -> None:
    """Pretrain the controlled model; write weights in bfloat16, figures.json and the card."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["embedded"])
    model = make_model(tokenizer, seed)
    began = time.monotonic()
    pretrain(model, tokenizer, steps, seed)
    seconds = time.monotonic() - began
    model.to(torch.bfloat16).save_pretrained(output)
    ids, prompt = draw_batch(tokenizer, 64, np.random.default_rng([seed, 1]))
    model.float().eval()
    with torch.no_grad():
        text, _ = losses(model, ids, prompt)
    figures = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "seed": seed,
        "seconds": round(seconds, 1),
        "loss": text.item(),
        "assigned_mass": assigned_mass(model, ids),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (output / "README.md").write_text(card(figures))
    typer.echo(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
