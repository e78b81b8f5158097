"""docs/parity.md, from what was measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
import transformers

from benchmarks.parity.compare import EXACT, Difference
from benchmarks.parity.files import TOPOLOGIES, Passage
from benchmarks.parity.modes import MODES
from benchmarks.parity.training import EXPERTS, LENGTH, ROWS

HEAD = """\
# Parity: several processes decide as one

`python -m benchmarks.parity` makes this page. A model is trained in several processes, each with
its share of the rows of every batch, and in one process with all of them. The model is an OLMoE
with 2 layers of {experts} experts in float64, the batch has {rows} rows of {length} tokens, the
optimizer is AdamW, and ranks grow in the first half of the steps.

*ranks* says whether the ranks of all experts are equal after every step, and *tokens* whether as
many were counted. *phi* and *s* are the largest difference of what the allocator was given, the
routing frequency and the importance, in any step. *loss* is that of any step and *weights* that
of A, B and routers at the end. All differences are relative to the largest value. Between
processes the weights are always equal, bit for bit. A mode agrees if all are below {exact:.0e}.
The norms and routers of the model, which convert to float32, are made to compute in float64 here.

What was run: {versions}, processes of one machine with gloo, on CPUs. **Not run: NCCL, and more
than one GPU or machine.**

| mode | processes | steps | events | ranks | tokens | phi | s | loss | weights | agrees |
|---|---:|---:|---:|---|---|---:|---:|---:|---:|---|
"""
FILES = """
## One file for every way to spread the model

An adapter with routers that learn after the warmup is saved in one topology, with
`adapter.save_pretrained`, and loaded in another with `drlora_torch.load`, two processes each;
then it trains on. The cells are the largest relative difference of the weights from a run in one
process. Ranks were {ranks} everywhere.

"""
CHECKPOINTS = """
The same with `torch.distributed.checkpoint` (`get_model_state_dict`,
`get_optimizer_state_dict`), which saves and loads the optimizer too, compared with going on
without a stop:

| saved in | loaded in | ranks | weights |
|---|---|---|---:|
"""


def write_page(found: Sequence[Difference], passages: Sequence[Passage]) -> str:
    """Return the page."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, "
    versions += f"transformers {transformers.__version__}"
    text = HEAD.format(
        experts=EXPERTS,
        rows=ROWS,
        length=LENGTH,
        exact=EXACT,
        versions=versions,
    )
    order = sorted(found, key=lambda each: (each.mode, each.world))
    text += "".join(map(_row, order))
    return text + _files(passages) + _checkpoints(passages)


def _row(found: Difference) -> str:
    mode = MODES[found.mode]
    cells = [
        f"{mode.group}: {mode.name}",
        str(found.world),
        str(found.steps),
        str(found.events),
        _equal(found.equal_ranks),
        _equal(found.equal_tokens),
        *(f"{each:.0e}" for each in (found.phi, found.s, found.loss, found.parameters)),
        "yes" if found.agrees else "**no**",
    ]
    return f"| {' | '.join(cells)} |\n"


def _equal(value: bool) -> str:
    return "equal" if value else "**differ**"


def _files(passages: Sequence[Passage]) -> str:
    cells = {(each.source, each.target): each for each in passages if not each.dcp}
    text = FILES.format(ranks=_equal(all(each.equal_ranks for each in cells.values())))
    text += f"| saved in, loaded in | {' | '.join(TOPOLOGIES)} |\n"
    text += "|---|" + "---:|" * len(TOPOLOGIES) + "\n"
    for source in TOPOLOGIES:
        row = [f"{cells[source, target].parameters:.0e}" for target in TOPOLOGIES]
        text += f"| {source} | {' | '.join(row)} |\n"
    return text


def _checkpoints(passages: Sequence[Passage]) -> str:
    text = CHECKPOINTS
    for each in passages:
        if each.dcp:
            cells = each.source, each.target, _equal(each.equal_ranks), f"{each.parameters:.0e}"
            text += f"| {' | '.join(cells)} |\n"
    return text
