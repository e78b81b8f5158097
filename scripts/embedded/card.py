"""Write the embedded model's card from the figures that the other scripts have measured.

No number of the card is typed by hand: training.json comes from pretrain.py and
specialisation.json from specialisation.py, so a rebuilt model cannot keep an old model's claims.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

SOURCES = {
    "python": "modules of the standard library",
    "stubs": "`.pyi` files of NumPy and PyTorch",
    "headers": "C and C++ headers of CPython, NumPy and PyTorch's `c10`",
    "prose": "topics of the language reference (`pydoc_data`), descriptions of packages",
    "licences": "licence files of installed packages",
    "charmaps": "character tables of the standard library's codecs",
    "vectors": "NumPy's floating-point test vectors",
    "json": "bills of materials of installed packages, tables of PyTorch and Datasets",
    "yaml": "PyTorch's declarations of operators and derivatives",
}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; floats get three digits."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def data_table(training: dict[str, Any]) -> str:
    """Return the kinds of text and their sizes."""
    rows = [
        [
            kind,
            SOURCES[kind],
            f"{size['train_documents']} / {size['train_bytes'] / 1000:.0f} kB",
            f"{size['held_out_documents']} / {size['held_out_bytes'] / 1000:.0f} kB",
        ]
        for kind, size in training["kinds"].items()
    ]
    return table(["kind", "source", "training documents", "held-out documents"], rows)


def curve_table(training: dict[str, Any]) -> str:
    """Return the loss curve: training loss, and held-out loss per kind."""
    kinds = list(training["kinds"])
    rows = [
        [point["step"], point["train"], *(point["held_out"][k] for k in kinds)]
        for point in training["curve"]
    ]
    return table(["step", "training", *kinds], rows)


def loss_table(training: dict[str, Any]) -> str:
    """Return the final held-out loss of each kind beside that of a unigram."""
    rows = [[k, training["unigram"][k], training["held_out"][k]] for k in training["kinds"]]
    return table(["kind", "unigram", "this model"], rows)


def information_table(proof: dict[str, Any]) -> str:
    """Return the mutual information of kind and expert, layer by layer."""
    columns = [proof[f"{name}"] for name in ("mutual_information_bits", "shuffled_bits_mean")]
    rows = [[layer, *values] for layer, values in enumerate(zip(*columns, strict=True))]
    return table(["layer", "bits", "bits with shuffled kinds"], rows)


def variation_table(proof: dict[str, Any]) -> str:
    """Return how far each kind's routing is from the average, and the experts it prefers."""
    rows: list[list[object]] = []
    for kind, distance in proof["total_variation"].items():
        shares = np.array(proof["frequencies"][kind])
        best = [f"{e} ({shares[layer, e]:.0%})" for layer, e in enumerate(shares.argmax(-1))]
        rows.append([kind, distance, *best])
    layers = len(proof["mutual_information_bits"])
    return table(["kind", "distance", *(f"layer {n}" for n in range(layers))], rows)


def extent(counts: Collection[int]) -> str:
    """Return how many rows each kind has, e.g. "32" or "20 to 32"."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def ablation_table(proof: dict[str, Any]) -> str:
    """Return the rise of the losses when each kind's own experts are removed."""
    ablation = proof["ablation"]
    rows = []
    for kind, rise in ablation["rise"].items():
        others = float(np.mean([v for k, v in rise.items() if k != kind]))
        rows.append([kind, rise[kind], others, ablation["random_rise"][kind]])
    head = ["experts removed of", "its own loss", "other kinds' loss", "its own, random removal"]
    return table(head, rows)


TITLES = {
    "olmoe": """# The embedded default model

A mixture-of-experts language model of {parameters:,} parameters (Transformers'
`{architecture}`), stored in bfloat16. `drlora finetune` uses it when no model is named. It was""",
    "qwen": """# A small Qwen-like model

A mixture-of-experts language model of {parameters:,} parameters (Transformers'
`{architecture}`), stored in bfloat16, of another family than the embedded default model
but with its tokenizer and the same kinds of text. It was""",
}
"""How the card of each family begins."""
NOTES = {
    "olmoe": """ (held-out
`json` is mostly a table of PyTorch's messages, whose like is not in the training part)"""
}
"""What is to be known of a model's held-out losses."""


def experts(config: dict[str, Any]) -> str:
    """Return the card's words for the experts of a layer."""
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    words = f"{config['num_experts']} experts of width {width}, of which every\n"
    words += f"token uses {config['num_experts_per_tok']}"
    if "shared_expert_intermediate_size" in config:
        words += f", and a shared expert of width {config['shared_expert_intermediate_size']}"
    return words


def about(training: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the card's description of the model and of its data."""
    title = TITLES[training.get("family", "olmoe")].format(
        parameters=training["parameters"], architecture=config["architectures"][0]
    )
    return f"""{title}
pretrained, by `scripts/embedded/pretrain.py`, on text found on any Python installation. It exists
to try and to test rank allocation without a download, and is good for nothing else: it knows
little, and what it writes only resembles the text below.

{config["num_hidden_layers"]} layers of width {config["hidden_size"]}, each with \
{experts(config)}; byte-level BPE of {config["vocab_size"]} tokens in which digits stay single; \
contexts of up to
{config["max_position_embeddings"]} tokens, of which training used 256.

## Data

{data_table(training)}

Paragraphs that repeat, within a kind or across kinds, were kept once. The held-out part consists
of whole files (sections of files for the reference's topics and for YAML). Every training row is
of one kind, and a batch holds equally many rows of each. SHA-256 of the corpus:
`{training["corpus_sha256"]}`.
Another installation has other packages or versions, so it gives another model of the same sort.
"""


def commands(training: dict[str, Any]) -> str:
    """Return the commands that make the model, its proof and its card."""
    options = f"--seed {training['seed']} --steps {training['steps']}"
    folder = ""
    if training.get("family", "olmoe") != "olmoe":
        options += f" --family {training['family']} \\\n"
        options += f"        --tokenizer-from {training['tokenizer_from']} --output MODEL"
        folder = " --model MODEL"
    return "\n".join(
        (
            f"    python scripts/embedded/pretrain.py {options}",
            f"    python scripts/embedded/specialisation.py{folder}",
            f"    python scripts/embedded/card.py{folder}",
        )
    )


def process(training: dict[str, Any]) -> str:
    """Return the card's account of the training and its losses."""
    versions = ", ".join(f"{name} {v}" for name, v in training["versions"].items())
    family = training.get("family", "olmoe")
    return f"""
## Training

{commands(training)}

AdamW, peak learning rate {training["learning_rate"]} with warmup and cosine decay, balancing loss \
weighted {training["aux"]},
{training["steps"]} steps of {training["rows_per_kind"] * len(training["kinds"])} rows of 256 \
tokens ({training["tokens"] / 1e6:.1f} million tokens),
{training["seconds"] / 60:.1f} minutes on {training["machine"]} (no GPU, shared with other work);
{versions}. The balancing loss is weighed
per layer, so that every expert of every layer stays in use.

Loss in nats per token, training (all kinds, mean since the line above) and held out (a quick look
at the first 8 rows of each kind, so not comparable with the final figures below):

{curve_table(training)}

In the end, on up to 32 held-out rows of each kind, with the weights as stored, beside guessing
each token by its frequency in the training text of the same kind{NOTES.get(family, "")}:

{loss_table(training)}
"""


def specialisation(proof: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the card's proof that the experts specialise."""
    count = proof["ablation"]["count"]
    return f"""
## Do the experts specialise?

All figures are of held-out text, {extent(proof["rows_per_kind"].values())} rows of each kind; \
`specialisation.json` has them all, with
the routing frequency of every expert for every kind.

**Mutual information** of the kind of text and the chosen expert, in bits; at most
{proof["most_possible_bits"]:.2f} are possible. The second column is the mean of 100 permutations of
the rows' kinds.

{information_table(proof)}

**Total-variation distance** of each kind's routing to the average of all kinds (mean of the
layers; 0 is the same routing, 1 is disjoint), and the expert it uses most in each layer with its
share of that layer's choices. On average over kinds, the least used expert of any layer gets
{proof["smallest_share"]:.2%} of the choices and the most used one {proof["largest_share"]:.1%}.

{variation_table(proof)}

**Ablation**: the {count} of {config["num_experts"] * config["num_hidden_layers"]} experts that a \
kind uses most beyond the others are hidden from the
router. The rise of the loss of that kind, of the other kinds (mean), and of that kind when {count}
random experts are hidden instead (mean of 5 draws):

{ablation_table(proof)}
"""


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model.")] = Path(
        "drlora_torch/embedded/model"
    ),
) -> None:
    """Write README.md from training.json, specialisation.json and config.json."""
    names = ("training", "specialisation", "config")
    figures = [json.loads((model / f"{name}.json").read_text()) for name in names]
    training, proof, config = figures
    text = about(training, config) + process(training) + specialisation(proof, config)
    (model / "README.md").write_text(text)


if __name__ == "__main__":
    typer.run(main)
