"""A fingerprint of a base model's experts: an adapter belongs to the weights it was trained on.

A sample of the weights is hashed, rounded to bfloat16: that takes milliseconds at any size and is
the same for a model loaded in float32 or in bfloat16.

Shape letters: I input and O output features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.errors import CheckpointError
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.records import MoELayer

POINTS = 8  # rows and columns of each sampled weight
COMPARABLE = {"float32", "bfloat16", "float64"}  # a float16 model rounds on its own


@torch.no_grad()
def of_model(model: nn.Module, layers: Sequence[MoELayer]) -> dict[str, Any]:
    return {
        "model": type(model).__name__,
        "dtype": layers[0].dtype,
        "experts": {each.name: _digest(model.get_submodule(each.name), each) for each in layers},
    }


def check(model: nn.Module, records: Mapping[str, MoELayer], saved: object) -> None:
    """Refuse a model whose experts are not those of a saved fingerprint; None passes."""
    if saved is None:
        return
    if not isinstance(saved, dict) or not isinstance(saved.get("experts"), dict):
        raise CheckpointError("the fingerprint of the base model cannot be read")
    names = [name for name in saved["experts"] if name in records]
    if not names:
        return
    own = of_model(model, [records[name] for name in names])
    dtypes = {own["dtype"], saved.get("dtype")}
    if len(dtypes) > 1 and not dtypes <= COMPARABLE:
        return
    differing = [name for name in names if own["experts"][name] != saved["experts"][name]]
    if differing:
        more = f" and {len(differing) - 1} more layers" if len(differing) > 1 else ""
        raise CheckpointError(
            f"the base model is another: the expert weights of {differing[0]!r}{more} are not "
            f"those of the training, on a {saved.get('model')}, {saved.get('dtype')} (this is a "
            f"{own['model']}, {own['dtype']}); load(..., check_base=False) does not compare them"
        )


def _digest(module: nn.Module, record: MoELayer) -> str:
    """Hash a few rows and columns of the first, the middle and the last expert."""
    convention = convention_of(module)
    digest = hashlib.blake2b(digest_size=8)
    for projection, shape in record.projections.items():
        digest.update(f"{projection} {record.num_experts} {tuple(shape)}\n".encode())
        for expert in sorted({0, record.num_experts // 2, record.num_experts - 1}):
            weight = convention.expert_weight(module, projection, expert)
            digest.update(_sample(weight.detach()).numpy().tobytes())
    return digest.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    """POINTS x POINTS values of a weight [O, I] spread over it, as the bits of bfloat16."""
    rows, columns = (torch.linspace(0, n - 1, min(n, POINTS)).long() for n in weight.shape)
    chosen = weight[rows.to(weight.device)][:, columns.to(weight.device)]
    return chosen.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
