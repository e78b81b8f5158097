"""A fingerprint of a base model's experts: an adapter belongs to the weights it was trained on.

A sample of the weights is hashed, rounded to bfloat16: that takes milliseconds at any size and is
the same for a model loaded in float32 or in bfloat16.

Shape letters: I input and O output features.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drlora_torch.errors import CheckpointError, ModelError
from drlora_torch.lora import parts
from drlora_torch.lora.spread import find_features
from drlora_torch.models.convention import Convention
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter
from drlora_torch.models.records import MoELayer

POINTS = 8  # rows and columns of each sampled weight
COMPARABLE = {"float32", "bfloat16", "float64"}
ROUNDED = COMPARABLE | {"float16"}  # which rounds on its own


@torch.no_grad()
def of_model(model: nn.Module, layers: Sequence[MoELayer]) -> dict[str, Any]:
    return {
        "model": _class_of(model).__name__,
        "dtype": layers[0].dtype,
        "experts": {each.name: _digest(model.get_submodule(each.name), each) for each in layers},
    }


def of_readable(model: nn.Module, layers: Sequence[MoELayer]) -> dict[str, Any] | None:
    """The fingerprint; None if weights cannot be read, as those of other quantizers."""
    try:
        return of_model(model, layers)
    except ModelError:
        return None


def _class_of(model: nn.Module) -> type:
    """The class of a model; ``fully_shard`` puts one of its own in front."""
    kinds = type(model).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("torch.distributed"))


def check(model: nn.Module, records: Mapping[str, MoELayer], saved: object) -> None:
    """Refuse a model whose experts are not those of a saved fingerprint.

    None, which stands for weights that could not be read, passes for a model of such weights only.
    """
    if saved is None:
        if of_readable(model, list(records.values())) is not None:
            raise CheckpointError(
                "it has no fingerprint of its base model, so whether this is the same one cannot "
                "be checked; load(..., check_base=False) does not compare them"
            )
        return
    if not isinstance(saved, dict) or not isinstance(saved.get("experts"), dict):
        raise CheckpointError("the fingerprint of the base model cannot be read")
    names = [name for name in saved["experts"] if name in records]
    if not names:
        return
    own = of_model(model, [records[name] for name in names])
    storages = {own["dtype"], str(saved.get("dtype"))}
    differing = [name for name in names if own["experts"][name] != saved["experts"][name]]
    if differing and len(storages) > 1 and not storages <= COMPARABLE:
        if not storages <= ROUNDED:
            warnings.warn(
                f"the adapter was trained on experts stored as {saved.get('dtype')}, and those of "
                f"this model are {own['dtype']}: its outputs differ by the rounding of the "
                "weights, and whether it is the same base is not checked",
                stacklevel=2,
            )
        return
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
            chosen = _sample(convention, module, projection, expert)
            bits = chosen.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def _sample(convention: Convention, module: nn.Module, projection: str, expert: int) -> Tensor:
    """POINTS x POINTS values of an expert's weight [O, I], spread over it."""
    where = convention.location(module, projection)
    if isinstance(where, ExpertParameter) and not convention.is_packed(module):
        weight = getattr(module.get_submodule(where.module), where.name)
        if parts.is_sharded(weight) and weight.dim() == 3:
            points = [torch.tensor([expert]), *map(_spread_points, weight.shape[1:])]
            chosen = _pick_sharded(weight.detach(), points)[0]
            return chosen.T if where.transposed else chosen
    weight = parts.whole(convention.expert_weight(module, projection, expert))
    rows, columns = (_spread_points(size).to(weight.device) for size in weight.shape)
    return weight[rows][:, columns]


def _spread_points(size: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, POINTS)).long()


def _pick_sharded(weight: Any, points: Sequence[Tensor]) -> Tensor:
    """Pick values of a DTensor at some indices of each dimension; every holder must call.

    Each process gives what it holds, and all get the sum: nothing else of the weight travels.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    held = parts.local(weight)
    picked = held.new_zeros([len(each) for each in points], dtype=torch.float64)
    places = []
    for dimension, wanted in enumerate(points):
        here = find_features(weight, dimension)
        here = torch.arange(weight.shape[dimension]) if here is None else here.cpu()
        among = torch.isin(wanted, here)
        places.append(among.nonzero()[:, 0].to(held.device))
        held = held.index_select(dimension, torch.searchsorted(here, wanted[among]).to(held.device))
    mesh = weight.device_mesh
    holders = mesh.size() // parts.num_parts(weight)  # of the same part
    picked[torch.meshgrid(*places, indexing="ij")] = held.double() / holders
    placements: list[Any] = [Partial() for _ in range(mesh.ndim)]
    summed = DTensor.from_local(picked.to(mesh.device_type), mesh, placements)
    for dimension in range(mesh.ndim):  # at once, torch warns
        placements[dimension] = Replicate()
        summed = summed.redistribute(placements=placements)
    return parts.local(summed)
