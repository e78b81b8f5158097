"""Generate docs/families.md from the test tables: ``python -m tests.torch.conformance.page``.

A test checks that the page is up to date.
"""

from __future__ import annotations

from pathlib import Path

from drlora_torch.models.refused import REASONS
from tests.torch.conformance.families import Family
from tests.torch.conformance.table import FAMILIES
from tests.torch.conventions.families import FAMILIES as OTHERS
from tests.torch.quantized.cases import STACKED, in_table

PATH = Path("docs/families.md")
TRANSFORMERS = "5.23"
HEAD = """# Model families

The mixture-of-experts classes of Transformers {version}, and what the tests check for each. The
script `python -m tests.torch.conformance.page` generates this page from the tables that the tests
use. `drlora inspect MODEL` prints the same information for a given model.

All checks run on a CPU with tiny random models (8 experts, H = 32, I = 24). They show that
arithmetic, statistics and files are correct for the conventions of a family. They do not show
that a released checkpoint trains well, or how it behaves on a GPU.

## Classes with the experts interface

One adapter covers all {count} classes, without class-specific code. Each class passes the whole
suite in `tests/torch/conformance`:

- At step 0, outputs equal those of the base model. With unequal ranks, outputs and all gradients
  of A and B equal those of the same model with W + s B A written into its weights, and so do the
  gradients of every other parameter, including routers. The relative error is below 1e-11 in
  float64 (the tests also raise to float64 what a model deliberately computes in float32).
- Both kernels agree (float32), and the model trains in bfloat16, including routers.
- phi equals a simple recomputation from the routing that the experts receive, and the importance
  one from the gradients. Padding and evaluation are not counted; checkpointed layers are counted
  once (reentrant or not).
- Growth leaves the function unchanged, `detach` restores every bit, and a saved adapter loads bit
  for bit.
- Merged outputs equal adapted outputs (1e-11), `unmerge` restores every bit, and
  `from_pretrained` reads a checkpoint of `merge_and_save` bit for bit.
- From rank 0 (`r_init=0`), outputs are those of the base model, routing is counted, A and B have
  gradients of 0, and events give experts rank that learns; with rank in some experts of one layer
  only, outputs and gradients are those of W + s B A (1e-11).
- `discover` finds every layer and its router.
- With its experts in 4 bits (NF4 or FP4, with or without double quantization), a model computes
  bit for bit what the same model computes after `dequantize_experts`, whose weights are those
  of a slow decoder: outputs and all gradients, with dropout, accumulation and checkpointing,
  for two adapters, growth, `disabled`, `detach` and saved adapters; on the rows that every run
  of the tests takes, also with both kernels, for copies and after `merge_and_save`. Outputs of
  W + s B A, written into those weights and run by Transformers, differ by less than 2e-6
  (float32), gradients by less than 2e-5. Quantizing while loading, quantizing in memory and
  reading a packed checkpoint give the same bits.

Vision towers take no mask, so padding is not checked there. Reentrant checkpointing in PyTorch
needs inputs that require grad. drlora ensures this at the token embeddings; if you pass
`inputs_embeds` yourself, call `requires_grad_(True)` on them.

Flags, as declared by the class: G gate, B biases, T weights stored [in, out], C gate and up
concatenated (otherwise interleaved), N norm on the experts' output, A a custom gate function. The
column "4 bits" is the format that this class is tested with; the four formats take turns.

| family | class | flags | layers | 4 bits | notes |
|---|---|---|---|---|---|
"""
MIDDLE = """
## Other conventions

{count} families store or call their experts differently; each convention has its own adapter. The
suite in `tests/torch/conventions` makes the same kinds of checks, including `merge` and
`unmerge`. [Adding a model](adding_a_model.md) explains how to declare another class. The column
"4 bits" says whether drlora packs the experts, with the checks of above; the last column how PEFT
loads [an export](ecosystem.md#export-to-peft); for the classes above it uses `target_parameters`.

| family | adapted as | projections | 4 bits | in PEFT |
|---|---|---|---|---|
"""
IN_PEFT = {
    "stacked": "unsupported; use `per_expert=True`",
    "per-expert Linears": "`target_modules`",
}
REFUSED = """
## Refused classes

| class | reason |
|---|---|
"""


def text() -> str:
    lines = [HEAD.format(version=TRANSFORMERS, count=len(FAMILIES))]
    lines += [_row(name, family) for name, family in FAMILIES.items()]
    lines.append(MIDDLE.format(count=len(OTHERS)))
    for name, other in OTHERS.items():
        exported = IN_PEFT.get(other.convention, "`target_parameters`")
        projections = ", ".join(other.projections)
        packed = "yes" if name in STACKED else "no: `BitsAndBytesConfig`"
        lines.append(f"| {name} | {other.convention} | {projections} | {packed} | {exported} |\n")
    lines.append(REFUSED)
    lines += [f"| `{name.rpartition('.')[2]}` | {why} |\n" for name, why in REASONS.items()]
    return "".join(lines)


def _row(name: str, family: Family) -> str:
    special = [family.fast] if family.fast and name != "olmoe" else []
    if not family.checkpoints:
        special.append("Transformers does not support gradient checkpointing here")
    form = in_table(name).form
    packed = form["quant_type"] + (", double" if form["double_quant"] else "")
    return (
        f"| {name} | {family.model} | `{family.flags}` | {family.layers} | {packed} | "
        f"{'; '.join(special)} |\n"
    )


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
