"""Merging: W + s B A written into the expert weights, and taken out again.

States of an adapter, and what leads from one to the next::

    attached --merge()--> merged --unmerge()--> attached
    attached --merge(keep_originals=False)--> taken out
    attached --detach()--> taken out
    attached --merge_and_save(path)--> attached

*Attached*: the LoRA is in the model, statistics are taken, everything works. *Merged*: the model
is a plain one with other weights, nothing of ours is in it; the adapter keeps the LoRA, the
engine, and a copy of every weight it wrote to; only ``unmerge``, ``ranks`` and what only reads
work, the rest raises :class:`drlora_torch.AttachError`. *Taken out*: the adapter has ended.

``unmerge`` copies the kept weights back, so it is exact: subtracting s B A again would leave
rounding errors.

Shape letters: I input and O output features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch import files
from drlora_torch.errors import AttachError, CheckpointError, ModelError
from drlora_torch.following import OptimizerFollower
from drlora_torch.models.conventions import convention_of
from drlora_torch.named import NamedAdapters

if TYPE_CHECKING:
    from drlora_torch.adapter import AdaptedLayer, Adapter

Place = tuple[str, str, int]
"""Layer name, projection, expert."""
SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Original:
    """One expert's weight as it was before merging."""

    values: Tensor  # [O, I], on the CPU
    written: int
    """Fingerprint of what was written in its place."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """What an adapter keeps while it is merged."""

    layers: dict[str, AdaptedLayer]
    originals: dict[Place, Original]
    guard: MergedGuard


class MergedGuard(OptimizerFollower):
    """Refuses optimizer steps on a LoRA that no forward uses any more."""

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._adapter() is not None and self._holds_lora(optimizer, alone=False):
            raise AttachError(
                "an optimizer step on an adapter that is merged into the weights would train "
                "nothing; call adapter.unmerge() first"
            )
        return None


@torch.no_grad()
def write(layers: Mapping[str, AdaptedLayer], *, keep: bool) -> dict[Place, Original]:
    """Write W + s B A into the weights of all experts that have a rank.

    The sum is taken in the wider dtype of both and rounded once, to that of the weights.

    Returns:
        The weights as they were, on the CPU; empty unless ``keep``. Where writing fails half way,
        they are restored.
    """
    originals: dict[Place, Original] = {}
    for place in _places(layers):
        _weight(layers, place)  # weights that cannot be written to are refused before any is
    try:
        for place, weight, delta in _deltas(layers):
            before = weight.to("cpu", copy=True) if keep else None
            wide = torch.promote_types(weight.dtype, delta.dtype)
            merged = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
            if before is not None:
                originals[place] = Original(before, _fingerprint(merged))
            weight.copy_(merged)
    except BaseException:
        restore(layers, originals)
        raise
    return originals


@torch.no_grad()
def restore(layers: Mapping[str, AdaptedLayer], originals: Mapping[Place, Original]) -> None:
    """Put the kept weights back, bit for bit."""
    for place, original in originals.items():
        _weight(layers, place).copy_(original.values)


@torch.no_grad()
def check_unmergeable(layers: Mapping[str, AdaptedLayer], originals: dict[Place, Original]) -> None:
    """Refuse to put weights back where others than the merged ones are by now.

    Raises:
        AttachError: the weights were trained, loaded or converted after ``merge``.
    """
    for place, original in originals.items():
        weight = _weight(layers, place)
        same_kind = (weight.dtype, weight.shape) == (original.values.dtype, original.values.shape)
        if not same_kind or _fingerprint(weight) != original.written:
            name, projection, expert = place
            raise AttachError(
                f"{projection} of expert {expert} of layer {name!r} has changed since merge() "
                "(was the merged model trained or converted?); unmerge() would throw that away"
            )


@contextlib.contextmanager
def written(layers: Mapping[str, AdaptedLayer]) -> Iterator[None]:
    """Inside, the expert weights are the merged ones; afterwards the original ones again."""
    originals = write(layers, keep=True)
    try:
        yield
    finally:
        restore(layers, originals)


class Mergeable:
    """The part of an :class:`drlora_torch.Adapter` that merges; no other class has it."""

    model: nn.Module
    layers: dict[str, AdaptedLayer]
    merged: Merged | None = None

    def merge(self: Adapter, *, keep_originals: bool = True) -> nn.Module:  # type: ignore[misc]
        """Write W + s B A into the expert weights and take the LoRA out; routers stay trained.

        The model is then a plain one, with no trace of the adapter. The sum is rounded to the
        dtype of the base weights.

        Args:
            keep_originals: keep a copy of every weight that is written to, on the CPU, so that
                :meth:`unmerge` can bring them back bit for bit. It takes the memory of the adapted
                weights, until ``unmerge`` or until this adapter is dropped. False: the adapter
                ends here.

        Raises:
            AttachError: the adapter is merged already, or was detached, or others are attached.
        """
        self.check_attached()
        self._check_alone()
        originals = write(self.layers, keep=keep_originals)
        layers = self.layers
        guard = MergedGuard(self) if keep_originals else None
        self.named.remove(self)
        self.show_routers(True)
        self.layers = {}
        if guard is not None:
            self.merged = Merged(layers, originals, guard)
        return self.model

    def unmerge(self: Adapter) -> nn.Module:  # type: ignore[misc]
        """Bring back the weights of before :meth:`merge`, bit for bit, and the LoRA with them.

        Ranks, statistics and the parameters that an optimizer holds are those of before.

        Raises:
            AttachError: the adapter is not merged, or the model has changed since.
        """
        if self.merged is None:
            raise AttachError(
                "this adapter is not merged (or its merge kept no copies of the weights, "
                "keep_originals=False)"
            )
        if not self.enabled:
            raise AttachError("unmerge() cannot run inside adapter.disabled()")
        layers, originals = self.merged.layers, self.merged.originals
        check_unmergeable(layers, originals)
        self._put_back(layers)
        restore(layers, originals)
        self.merged.guard.remove()
        self.merged = None
        return self.model

    def merge_and_save(self: Adapter, path: str | os.PathLike[str]) -> None:  # type: ignore[misc]
        """Write the merged model as a plain Transformers checkpoint; the adapter stays as it is.

        ``from_pretrained`` loads it with nothing of drlora installed. While it is written, the
        adapted weights are kept twice, as in :meth:`merge`.

        Raises:
            AttachError: the adapter is merged already, was detached, is disabled, or another one
                is active.
            CheckpointError: nothing could be written (no space, no permission).
            ModelError: the model is none of Transformers.
        """
        self.check_active()
        if not self.enabled:
            raise AttachError("merge_and_save() cannot run inside adapter.disabled()")
        save_model: Any = getattr(self.model, "save_pretrained", None)
        if save_model is None:
            raise ModelError(
                f"{type(self.model).__name__} has no save_pretrained; call adapter.merge() and "
                "save model.state_dict() yourself"
            )
        try:
            whole = files.folder_written_whole(Path(path), "model*.safetensors*")
            with whole as folder, written(self.layers):
                save_model(os.fspath(folder))
        except OSError as error:
            raise CheckpointError(
                f"could not write a merged model to {path}: {error}; what was there before is "
                "untouched"
            ) from error

    def _check_alone(self: Adapter) -> None:  # type: ignore[misc]
        others = [name for name in self.named.by_name if name != self.name]
        if others:
            raise AttachError(
                f"merge() would change the weights under the other adapters of the model "
                f"({', '.join(map(repr, others))}); call their detach() first, or merge_and_save()"
            )

    def _put_back(self: Adapter, layers: dict[str, AdaptedLayer]) -> None:  # type: ignore[misc]
        named = NamedAdapters.of(self.model)
        if named.by_name:
            raise AttachError("another adapter was attached to the model; call its detach() first")
        self.layers = layers
        try:
            named.add(self)
        except BaseException:
            self.show_routers(True)
            self.layers = {}
            raise

    def check_not_merged(self) -> None:
        """Refuse what a merged adapter cannot do."""
        if self.merged is not None:
            raise AttachError(
                "this adapter is merged into the weights of the model; call adapter.unmerge() first"
            )


def _places(layers: Mapping[str, AdaptedLayer]) -> Iterator[Place]:
    """Every expert with a rank, projection by projection."""
    for name, layer in layers.items():
        for projection, _ in layer.lora.items():
            for expert in np.flatnonzero(layer.lora.table.ranks()).tolist():
                yield name, projection, expert


def _deltas(layers: Mapping[str, AdaptedLayer]) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Weight (a view) and s B A of each of them, [O, I]."""
    for place in _places(layers):
        name, projection, expert = place
        weight = _weight(layers, place)
        yield place, weight, layers[name].lora.delta_weight(projection, expert).to(weight.device)


def _weight(layers: Mapping[str, AdaptedLayer], place: Place) -> Tensor:
    name, projection, expert = place
    convention = convention_of(layers[name].experts)
    assert convention is not None
    return convention.expert_weight(layers[name].experts, projection, expert).detach()


def _fingerprint(weight: Tensor) -> int:
    """Sum of the bits as integers: exact, in any order and on any device."""
    bits = weight.contiguous().view(SAME_SIZE[weight.element_size()])
    return int(bits.sum(dtype=torch.int64))
