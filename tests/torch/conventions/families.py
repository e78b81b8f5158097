"""Tiny models of every convention beside the interface, and where each keeps its weights.

E = 8 experts, H = 32, I = 24: no expert weight is square. ``locate`` is written here from the
models' own code, not taken from the adapters under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.torch import models
from tests.torch.conventions import builders
from tests.torch.models import EXPERTS, HIDDEN, INNER

Located = tuple[nn.Parameter, Callable[[Tensor], Tensor]]
"""A parameter of the model, and the part of it (or of its gradient) that is one expert's [O, I]."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table."""

    make: Callable[[], nn.Module]
    convention: str
    locate: Callable[[Any, str, int], Located]
    told: str
    """The module beside or in the layer that tells the routing, by its name there."""
    dense: Callable[[Any, Any], Tensor]
    """What it takes and returns -> the weight of every token and expert, [T, N]."""
    layers: int = 2
    projections: dict[str, tuple[int, int]]
    encoder_decoder: bool = False
    patterns: list[str] | None = None
    """The option ``layers``, for what is adapted on request only."""
    rounding: float = 1e-9
    """Relative; of models in float64, some of which compute parts in float32."""


def _fused(module: Any, projection: str, expert: int) -> Located:
    return getattr(module, projection), lambda weight: weight[expert]


def _rows(module: Any, projection: str, expert: int) -> Located:
    rows = slice(expert * INNER, (expert + 1) * INNER)
    parameter = getattr(module.mlp, projection)
    return parameter, lambda w: w[rows].T if projection == "w2" else w[rows]


def _transposed(module: Any, projection: str, expert: int) -> Located:
    return getattr(module.experts, projection), lambda weight: weight[expert].T


def _child(module: Any, projection: str, expert: int) -> Located:
    return getattr(module, projection).weight, lambda weight: weight[expert]


def _linear(module: Any, projection: str, expert: int) -> Located:
    return getattr(module.experts[f"expert_{expert}"], projection).weight, lambda weight: weight


def _scattered(args: Any, output: Any) -> Tensor:
    """Routing as arguments (hidden, index, weights) of the experts; indices may repeat."""
    _, index, weights = args
    dense = torch.zeros(index.shape[0], 2 * EXPERTS, dtype=torch.float64)
    return dense.scatter_add(1, index, weights.double())[:, :EXPERTS]


def _scores(args: Any, output: Any) -> Tensor:
    scores: Tensor = output[0]
    return scores


def _gates(args: Any, output: Any) -> Tensor:
    """JetMoE's router: softmax over the largest two logits, scattered back."""
    logits: Tensor = output[4]
    kept = logits.masked_fill(logits < logits.topk(2, dim=1).values[:, -1:], float("-inf"))
    return kept.softmax(dim=1)


def _probabilities(args: Any, output: Any) -> Tensor:
    """Switch's router: one-hot times probability."""
    weights: Tensor = output[0] * output[1]
    return weights.reshape(-1, EXPERTS)


def _by_mask(args: Any, output: Any) -> Tensor:
    """NLLB's experts: the mask's ones go to expert 1, its zeros to expert 0."""
    _, mask, gates = args
    dense = torch.zeros(mask.shape[0], EXPERTS, dtype=torch.float64)
    dense[:, 1] = (gates * mask).sum(dim=1)
    dense[:, 0] = (gates * (1 - mask)).sum(dim=1)
    return dense


GATED = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
FAMILIES: dict[str, Family] = {
    "step3p7": Family(
        rounding=1e-5,
        make=builders.step3p7,
        convention="undecorated",
        told="",
        dense=_scattered,
        locate=_fused,
        projections=GATED,
    ),
    "longcat_flash": Family(
        rounding=1e-4,
        make=builders.longcat_flash,
        convention="identity experts",
        told="",
        dense=_scattered,
        locate=_fused,
        projections=GATED,
    ),
    "dbrx": Family(
        make=builders.dbrx,
        convention="stacked",
        told="",
        dense=_scattered,
        locate=_rows,
        projections={"w1": (HIDDEN, INNER), "v1": (HIDDEN, INNER), "w2": (INNER, HIDDEN)},
    ),
    "llama4": Family(
        make=builders.llama4,
        convention="weighted inputs",
        told="router",
        dense=_scores,
        locate=_transposed,
        projections=GATED,
    ),
    "jetmoe": Family(
        make=builders.jetmoe,
        convention="single projections",
        told="router",
        dense=_gates,
        locate=_child,
        projections={"input_linear": (HIDDEN, 2 * INNER), "output_linear": (INNER, HIDDEN)},
    ),
    "switch_transformers": Family(
        make=builders.switch_transformers,
        convention="per-expert Linears",
        told="router",
        dense=_probabilities,
        locate=_linear,
        projections={"wi": (HIDDEN, INNER), "wo": (INNER, HIDDEN)},
        encoder_decoder=True,
    ),
    "nllb_moe": Family(
        make=builders.nllb_moe,
        convention="per-expert Linears",
        told="experts",
        dense=_by_mask,
        locate=_linear,
        projections={"fc1": (HIDDEN, INNER), "fc2": (INNER, HIDDEN)},
        encoder_decoder=True,
    ),
}
CASES = {
    **FAMILIES,
    "jetmoe_attention": Family(
        make=builders.jetmoe,
        convention="single projections",
        patterns=["*.self_attention.experts"],
        told="router",
        dense=_gates,
        locate=_child,
        projections={"input_linear": (HIDDEN, 16), "output_linear": (16, HIDDEN)},
    ),
}
"""The families, and what is adapted on request."""


def build(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """Build a model with random weights, in training mode; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        model = CASES[family].make()
    models.redraw(model)
    for module in model.modules():
        if type(module).__name__ in ("SwitchTransformersTop1Router", "NllbMoeTop2Router"):
            module.dtype = dtype  # their configs know only dtypes up to float32
    return model.to(dtype).train()


def batch(family: str, seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Draw the inputs of a forward with a loss."""
    ids = models.tokens(rows, length, seed)
    return {"input_ids": ids, "labels": ids.clone()}
