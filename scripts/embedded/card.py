"""Write the card of a small model from measured figures.

All numbers come from training.json (pretrain.py) and specialisation.json (specialisation.py), so
the card of a rebuilt model cannot keep old figures.
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
    """A Markdown table; floats with three digits."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def data_table(training: dict[str, Any]) -> str:
    """Kinds of text and their sizes."""
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
    """Loss curve: training loss, and held-out loss per kind."""
    kinds = list(training["kinds"])
    rows = [
        [point["step"], point["train"], *(point["held_out"][k] for k in kinds)]
        for point in training["curve"]
    ]
    return table(["step", "training", *kinds], rows)


def loss_table(training: dict[str, Any]) -> str:
    """Final held-out loss per kind, and that of a unigram model."""
    rows = [[k, training["unigram"][k], training["held_out"][k]] for k in training["kinds"]]
    return table(["kind", "unigram", "this model"], rows)


def information_table(proof: dict[str, Any]) -> str:
    """Mutual information of kind and expert, by layer."""
    columns = [proof[f"{name}"] for name in ("mutual_information_bits", "shuffled_bits_mean")]
    rows = [[layer, *values] for layer, values in enumerate(zip(*columns, strict=True))]
    return table(["layer", "bits", "bits with shuffled kinds"], rows)


def variation_table(proof: dict[str, Any]) -> str:
    """Distance of the routing of each kind from the average, and its most used experts."""
    rows: list[list[object]] = []
    for kind, distance in proof["total_variation"].items():
        shares = np.array(proof["frequencies"][kind])
        best = [f"{e} ({shares[layer, e]:.0%})" for layer, e in enumerate(shares.argmax(-1))]
        rows.append([kind, distance, *best])
    layers = len(proof["mutual_information_bits"])
    return table(["kind", "distance", *(f"layer {n}" for n in range(layers))], rows)


def extent(counts: Collection[int]) -> str:
    """Range of the number of rows per kind, e.g. "32" or "20 to 32"."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def ablation_table(proof: dict[str, Any]) -> str:
    """Increase of the loss when the specific experts of each kind are removed."""
    ablation = proof["ablation"]
    rows = []
    for kind, rise in ablation["rise"].items():
        others = float(np.mean([v for k, v in rise.items() if k != kind]))
        rows.append([kind, rise[kind], others, ablation["random_rise"][kind]])
    head = ["kind whose experts are removed", "its loss", "other kinds", "its loss, random experts"]
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
"""First paragraph of the card, by family."""
NOTES = {
    "olmoe": """ (held-out `json` is mostly
a table of messages of PyTorch, and nothing similar is in the training part)"""
}
"""Remarks on the held-out losses, by family."""


def experts(config: dict[str, Any]) -> str:
    """Description of the experts of a layer."""
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    words = f"{config['num_experts']} experts of width {width},\n"
    words += f"{config['num_experts_per_tok']} per token"
    if "shared_expert_intermediate_size" in config:
        words += f", and a shared expert of width {config['shared_expert_intermediate_size']}"
    return words


def about(training: dict[str, Any], config: dict[str, Any]) -> str:
    """Description of the model and its data."""
    title = TITLES[training.get("family", "olmoe")].format(
        parameters=training["parameters"], architecture=config["architectures"][0]
    )
    return f"""{title}
pretrained by `scripts/embedded/pretrain.py` on text from a Python installation. Use it to try and
test rank allocation without a download, and for nothing else: it knows little, and its output only
resembles the text below.

{config["num_hidden_layers"]} layers of width {config["hidden_size"]}, each with \
{experts(config)}; byte-level BPE with {config["vocab_size"]} tokens and single digits; context
length {config["max_position_embeddings"]}, of which training used 256.

## Data

{data_table(training)}

Repeated paragraphs were kept once. The held-out part consists of whole files (sections of files for
the topics of the language reference and for YAML). Every training row is of one kind, and a batch
has the same number of rows of each kind. SHA-256 of the corpus: `{training["corpus_sha256"]}`.
Other packages or versions give a different corpus, and so a different model of the same kind.
"""


def commands(training: dict[str, Any]) -> str:
    """Commands that make the model, its figures and its card."""
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
    """Training and losses."""
    versions = ", ".join(f"{name} {v}" for name, v in training["versions"].items())
    family = training.get("family", "olmoe")
    return f"""
## Training

{commands(training)}

AdamW, peak learning rate {training["learning_rate"]} with warmup and cosine decay, balancing loss \
weighted {training["aux"]},
{training["steps"]} steps of {training["rows_per_kind"] * len(training["kinds"])} rows of 256 \
tokens ({training["tokens"] / 1e6:.1f} million tokens),
{training["seconds"] / 60:.1f} minutes on {training["machine"]} (no GPU, shared machine);
{versions}. The balancing loss is computed
per layer, so all experts of all layers stay in use.

Loss in nats per token: training (all kinds, mean since the previous line) and held out (the first 8
rows of each kind, so not comparable with the final figures below):

{curve_table(training)}

Final loss on up to 32 held-out rows of each kind, with the stored weights, and the loss of a
unigram model of the training text of the same kind{NOTES.get(family, "")}:

{loss_table(training)}
"""


def specialisation(proof: dict[str, Any], config: dict[str, Any]) -> str:
    """Evidence that the experts specialise."""
    count = proof["ablation"]["count"]
    return f"""
## Do the experts specialise?

All figures are for held-out text, {extent(proof["rows_per_kind"].values())} rows of each kind; \
`specialisation.json` has all of them, and
the routing frequency of every expert for every kind.

**Mutual information** of the kind of text and the chosen expert, in bits; the maximum is
{proof["most_possible_bits"]:.2f}. The second column is the mean over 100 permutations of the kinds.

{information_table(proof)}

**Total-variation distance** between the routing of each kind and the average of all kinds (mean
over layers; 0: equal, 1: disjoint), and the most used expert in each layer with its share of the
choices. On average over kinds, the least used expert of any layer gets
{proof["smallest_share"]:.2%} of the choices and the most used one {proof["largest_share"]:.1%}.

{variation_table(proof)}

**Ablation**: the router cannot choose the {count} of \
{config["num_experts"] * config["num_hidden_layers"]} experts that are most specific to a kind.
Increase of the loss of that kind, of the other kinds (mean), and of that kind without {count}
random experts instead (mean of 5 draws):

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
