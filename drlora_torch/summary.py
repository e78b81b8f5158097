"""What an adapter shows at a prompt and in a notebook. Nothing here waits or closes a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core import notebook
from drlora_torch.attached import Attached
from drlora_torch.lifecycle.residents import is_active
from drlora_torch.models.counting import describe_trainable
from drlora_torch.models.records import describe_storage


def line(attached: Attached) -> str:
    """Describe an adapter in a line."""
    ranks = _ranks(attached)
    parts = [repr(attached.name), _state(attached), notebook.describe_layers(ranks)]
    parts += [f"total rank {notebook.total_rank(ranks):,}"] if ranks else []
    parts += [_dense(attached)] if attached.dense else []
    parts += [notebook.count(len(attached.events), "event")]
    parts += [_storage(attached)] if ranks else []
    return f"Adapter({', '.join(parts)})"


def text(attached: Attached) -> notebook.Text:
    """Describe an adapter in some lines."""
    facts = _facts(attached)
    width = max(map(len, facts))
    lines = [f"{name:{width}}  {value}" for name, value in facts.items()]
    return notebook.Text("\n".join(lines))


def table(attached: Attached) -> str:
    """Describe an adapter as HTML: what :func:`text` says, and the ranks of each layer."""
    facts = notebook.html_table("Adapter", (), _facts(attached).items())
    ranks = _ranks(attached)
    return f"{facts}\n{notebook.layers_table('Ranks', ranks)}" if ranks else facts


def _facts(attached: Attached) -> dict[str, str]:
    events, pending = attached.events, attached.engine.pending
    rank = attached.options.attention_rank
    last = f", the last after step {events[-1].step}" if events else ""
    return {
        "adapter": f"{attached.name}, {_state(attached)}",
        "model": type(attached.model).__name__,
        "storage": _storage(attached),
        "layers": notebook.describe_layers(_ranks(attached)),
        "ranks": _describe_ranks(attached),
        **({"dense": f"{_dense(attached)} of rank {rank}"} if attached.dense else {}),
        "parameters": describe_trainable(attached.model),
        "events": f"{len(events)} of {attached.engine.config.num_events}{last}",
        "skipped steps": f"{attached.skipped_steps:,}" + (", one step pending" * pending),
    }


def _state(attached: Attached) -> str:
    if attached.merged is not None:
        return "merged"
    if not attached.layers:
        return "detached"
    if not is_active(attached):
        return "inactive"
    return "active" if attached.enabled else "disabled"


def _storage(attached: Attached) -> str:
    return describe_storage(layer.record for layer in attached.layers.values())


def _dense(attached: Attached) -> str:
    return notebook.count(len(attached.dense), "dense Linear")


def _ranks(attached: Attached) -> dict[str, Any]:
    """Ranks of the layers, [N] by name, as the LoRA has them."""
    return {name: layer.lora.table.ranks() for name, layer in attached.layers.items()}


def _describe_ranks(attached: Attached) -> str:
    ranks = _ranks(attached)
    if not ranks:
        return "none"
    joined, target = np.concatenate(list(ranks.values())), attached.engine.config.r_target
    return (
        f"{joined.min()} to {joined.max()}, mean {joined.mean():.2f}; "
        f"total {joined.sum():,} of {target * joined.size:,}"
    )
