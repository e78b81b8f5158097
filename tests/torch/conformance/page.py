"""Write docs/families.md from the tables of the tests: ``python -m tests.torch.conformance.page``.

A test keeps the page and the tables the same.
"""

from __future__ import annotations

from pathlib import Path

from drlora_torch.models.refused import REASONS
from tests.torch.conformance.families import Family
from tests.torch.conformance.table import FAMILIES
from tests.torch.conventions.families import FAMILIES as OTHERS

PATH = Path("docs/families.md")
TRANSFORMERS = "5.23"
HEAD = """# Model families

The mixture-of-experts classes of Transformers {version}, and what the tests check of each. This
page is written by `python -m tests.torch.conformance.page` from the tables that the tests run over;
`drlora inspect MODEL` says the same of a model at hand.

Every check runs on tiny random models on a CPU (8 experts, H = 32, I = 24): it shows that the
arithmetic, the statistics and the files are right for the conventions of a family, not that a
released checkpoint trains well, nor how it behaves on a GPU.

## Classes with the experts interface

{count} classes, one adapter, no code of their own. Each passes the whole suite
(`tests/torch/conformance`):

- outputs equal the base model's at step 0; with unequal ranks, outputs and every gradient of A and
  B equal those of the same model with W + s B A written into its weights, and so do the gradients
  of every other parameter, routers included: relative error below 1e-11, in float64 (what a model
  computes in float32 on purpose is computed in float64 here too);
- both kernels agree (float32), and the model trains in bfloat16, routers included;
- phi equals a plain recomputation from the routing that the experts receive, and the importance one
  from the gradients; padding and evaluation count nothing, checkpointed layers count once
  (reentrant or not);
- growth leaves the function as it is; `detach` restores every bit; a saved adapter comes back bit
  for bit;
- merged outputs equal adapted ones (1e-11); `unmerge` restores every bit; `merge_and_save` writes a
  checkpoint that `from_pretrained` reads back bit for bit;
- `discover` finds every layer and its router.

Vision towers take no mask, so there is no padding to check. Reentrant checkpointing, as always in
PyTorch, needs inputs that require grad: drlora sees to it at the token embeddings, but where you
pass `inputs_embeds` yourself, call `requires_grad_(True)` on them.

Flags, as the class declares them: G gate, B biases, T weights stored [in, out], C gate and up in
halves (else interleaved), N norm on the experts' output, A a gate function of its own.

| family | class | flags | layers | what is special |
|---|---|---|---|---|
"""
MIDDLE = """
## Other conventions

{count} families store or call their experts in ways of their own; each way has its adapter
(`tests/torch/conventions` runs a suite of the same kind over them, `merge` and `unmerge`
included). [Adding a model](adding_a_model.md) tells how to declare another class. The last column
says how PEFT adapts them in [an export](ecosystem.md#export-to-peft): the classes above by
`target_parameters`.

| family | adapted as | projections | in PEFT |
|---|---|---|---|
"""
IN_PEFT = {"stacked": "no way; `per_expert=True`", "per-expert Linears": "`target_modules`"}
REFUSED = """
## Refused, and why

| class | reason |
|---|---|
"""


def text() -> str:
    """Return the page."""
    lines = [HEAD.format(version=TRANSFORMERS, count=len(FAMILIES))]
    lines += [_row(name, family) for name, family in FAMILIES.items()]
    lines.append(MIDDLE.format(count=len(OTHERS)))
    for name, other in OTHERS.items():
        exported = IN_PEFT.get(other.convention, "`target_parameters`")
        projections = ", ".join(other.projections)
        lines.append(f"| {name} | {other.convention} | {projections} | {exported} |\n")
    lines.append(REFUSED)
    lines += [f"| `{name.rpartition('.')[2]}` | {why} |\n" for name, why in REASONS.items()]
    return "".join(lines)


def _row(name: str, family: Family) -> str:
    special = [family.fast] if family.fast and name != "olmoe" else []
    if not family.checkpoints:
        special.append("Transformers refuses gradient checkpointing, so that is not checked")
    return (
        f"| {name} | {family.model} | `{family.flags}` | {family.layers} | {'; '.join(special)} |\n"
    )


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
