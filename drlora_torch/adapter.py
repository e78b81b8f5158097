"""The adapter: the handle of a model whose experts carry LoRA with dynamic ranks.

A thin façade: each method hands the state to the operation of its name.

Shape letters: N experts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from drlora_core import AllocatorEngine, GrowthEvent, frames
from drlora_torch import merge, summary
from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.errors import refuse_copy
from drlora_torch.lifecycle import switches
from drlora_torch.lifecycle.residents import Residents, active_tracker, check_attached, is_active
from drlora_torch.merge import MergeReport
from drlora_torch.models import counting
from drlora_torch.models.records import describe_storage
from drlora_torch.options import AdapterOptions
from drlora_torch.step import parameters, sharded
from drlora_torch.storage import checkpoint, hub, travel
from drlora_torch.storage.peft import exporting, importing
from drlora_torch.storage.peft.exporting import ExportReport


class Adapter:
    """Made by :func:`drlora_torch.attach` or :func:`drlora_torch.load`; not by hand."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def __repr__(self) -> str:
        return summary.line(self._attached)

    def _repr_html_(self) -> str:
        return summary.table(self._attached)

    __reduce__ = refuse_copy

    # -- what it is ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name among the adapters of the model, ``adapter_name`` of ``attach``."""
        return self._attached.name

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._attached.model

    @property
    def storage(self) -> str:
        """How the adapted experts are stored, in words, and the bytes they take."""
        return describe_storage(layer.record for layer in self._attached.layers.values())

    @property
    def engine(self) -> AllocatorEngine:
        """The engine that decides the ranks."""
        return self._attached.engine

    @property
    def options(self) -> AdapterOptions:
        """The options of ``attach``."""
        return self._attached.options

    @property
    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers by name; empty once the adapter is detached."""
        return self._attached.layers

    @property
    def events(self) -> list[GrowthEvent]:
        """Growth events so far, oldest first; those of a loaded run included.

        They never wait for a device, and neither do :meth:`ranks`: a step with an event is closed
        at once.
        """
        return self._attached.events

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that counted for nothing.

        Their statistics were not finite, or no backward pass reached the experts.
        """
        self._attached.engine.settle()
        return self._attached.skipped_steps

    @property
    def is_active(self) -> bool:
        """True for the adapter that the model runs with; always, if it is the only one."""
        return is_active(self._attached)

    @property
    def is_sharded(self) -> bool:
        """True if several processes hold the adapter's parameters together (DTensors)."""
        return sharded.is_sharded(self._attached)

    def ranks(self) -> dict[str, np.ndarray]:
        """Active rank of every expert, int64 [N] by layer name."""
        return {name: layer.lora.table.ranks() for name, layer in self._attached.layers.items()}

    def summary(self) -> str:
        """State, layers, ranks, storage, parameters and events in some lines, which a prompt shows.

        The deferred step of an engine is closed first (:meth:`AllocatorEngine.settle`).
        """
        self.engine.settle()
        return summary.text(self._attached)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Parameters of the model that require gradients, and all of them, as PEFT counts them.

        Packed weights count as the values that they stand for, and a LoRA with all its slots.
        """
        return counting.trainable_and_all(self.model)

    def print_trainable_parameters(self) -> None:
        """Print those numbers in PEFT's words."""
        print(counting.describe_trainable(self.model))

    def to_frame(self) -> Any:
        """:meth:`AllocatorEngine.to_frame`: ranks and statistics as a pandas DataFrame."""
        return self.engine.to_frame()

    def events_frame(self) -> Any:
        """:func:`drlora_core.frames.events_frame` of :attr:`events`: a pandas DataFrame."""
        return frames.events_frame(self.events)

    # -- training ------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Everything to give to an optimizer.

        A and B of all layers and of the dense Linears, routers that may learn, and
        ``modules_to_save``.

        Those of the active adapter require gradients again if something else froze them
        (``get_peft_model`` freezes whatever is not PEFT's).

        Raises:
            AttachError: the adapter was detached or merged, or a module of ``modules_to_save`` is
                no longer that of the model.
        """
        check_attached(self._attached)
        sharded.free_gathered(self._attached)
        parameters.check_in_place(self._attached)
        if self.is_active:
            parameters.unfreeze_lora(self._attached)
            parameters.unfreeze_base(self._attached)
        return list(parameters.parameters_by_key(self._attached).values())

    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of all layers and of the dense Linears, for a parameter group of their own."""
        sharded.free_gathered(self._attached)
        dense = parameters.dense_parameters(self._attached).values()
        return [*parameters.lora_parameters(self._attached), *dense]

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Router parameters that learn (now or after the warmup), by qualified name."""
        sharded.free_gathered(self._attached)
        return parameters.router_parameters(self._attached)

    def step(self, grad_scale: float = 1.0) -> GrowthEvent | None:
        """Close an optimizer step by hand; only with ``auto_step=False``.

        Call it once per optimizer step, after the update; ``zero_grad`` may come before or after.

        Args:
            grad_scale: what the loss was multiplied with (``GradScaler.get_scale()``).

        Returns:
            The growth event that followed, or None; always None inside :meth:`paused`.

        Raises:
            AttachError: with ``auto_step=True``, after ``detach``, or while another adapter is
                active.
        """
        return active_tracker(self._attached).close_by_hand(grad_scale)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, routers included; nothing is counted.

        Raises:
            AttachError: another adapter is active: the model would not be the base model.
        """
        with switches.disabled(self._attached):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no statistics are taken and optimizer steps do not count."""
        with switches.paused(self._attached):
            yield

    # -- life ----------------------------------------------------------------------------------

    def activate(self) -> None:
        """Make this the adapter that the model runs with and that trains.

        The others become inactive. Trained routers are exchanged too. The partial state of the
        current optimizer step, gradients included, is put aside and comes back with its adapter.

        Raises:
            AttachError: the adapter was detached, or the active one is disabled.
        """
        check_attached(self._attached)
        Residents.of(self.model).activate(self._attached)

    def detach(self) -> nn.Module:
        """Take the adapter out; without any, the model is as before ``attach``, bit for bit.

        If it was active, the last of the others to be attached is active now.
        """
        check_attached(self._attached)
        Residents.of(self.model).remove(self._attached)
        self._attached.layers, self._attached.dense = {}, {}
        self._attached.handle = None  # a cycle would keep the model until it is collected
        return self.model

    def merge(self, *, keep_originals: bool = True) -> nn.Module:
        """Write W + s B A into the adapted weights and take the LoRA out; routers stay trained.

        The model is then a plain one, with no trace of the adapter. The sum is rounded to the
        dtype of the base weights. While it is written, a copy of every adapted weight is kept on
        the CPU, so that a failure leaves the model as it was.

        Args:
            keep_originals: keep those copies, so that :meth:`unmerge` can bring the weights back
                bit for bit. They take the memory of the adapted weights, until ``unmerge`` or
                until this adapter is dropped. False: the adapter ends here.

        Raises:
            AttachError: the adapter is merged already, or was detached, or others are attached.
        """
        sharded.check_whole(self._attached, "merge")
        merge.merge(self._attached, keep_originals=keep_originals)
        return self.model

    def unmerge(self) -> nn.Module:
        """Bring back the weights of before :meth:`merge`, bit for bit, and the LoRA with them.

        Ranks, statistics and the parameters that an optimizer holds are those of before.

        Raises:
            AttachError: the adapter is not merged, or the model has changed since.
        """
        merge.unmerge(self._attached)
        return self.model

    # -- files ---------------------------------------------------------------------------------

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write the adapter and the engine's state to a directory, atomically.

        Load it with :func:`drlora_torch.load`. A file that is already there is replaced only when
        the new one is complete. Between micro-batches of an accumulation, the partial state of the
        step is saved too.

        Processes that hold the adapter together (:attr:`is_sharded`) must all call, and the first
        one writes. Where each holds it whole, as in ``DistributedDataParallel``, each that calls
        writes: all may, or one. The file is the same for every way to spread the model, and loads
        in each.

        Args:
            path: the directory.
            push_to_hub: upload the adapter with a model card too; it is written to ``path``,
                unless it has one.
            repo_id: repository on the hub; default: the name of the directory.
            private: visibility of a repository that is made; default: the account's.

        Raises:
            CheckpointError: nothing could be written (no space, no permission) or uploaded, or
                some of the processes that hold the adapter together did not call.
        """
        check_attached(self._attached)
        travel.settle(self._attached)
        folder = Path(path)
        checkpoint.save(self._attached, folder)
        if push_to_hub:
            uploads = sharded.writes(self._attached)
            with sharded.together(self._attached, "push_to_hub"):
                if uploads:
                    name = repo_id or folder.resolve().name
                    hub.upload(self._attached, folder, name, private)

    def restore(self, path: str | os.PathLike[str], *, check_base: bool = True) -> None:
        """Bring the adapter to a saved state, in place: parameters keep their identity.

        This is how a trainer resumes whose optimizer already holds :meth:`parameters`. All
        processes that train the adapter must call.

        Args:
            path: what :meth:`save_pretrained` wrote.
            check_base: as for :func:`drlora_torch.load`.

        Raises:
            CheckpointError: as :func:`drlora_torch.load`, or the file was saved by an adapter with
                other options. The adapter is left unchanged.
        """
        check_attached(self._attached)
        checkpoint.restore(self._attached, Path(path), check_base=check_base)
        travel.forget(self._attached)

    def merge_and_save(
        self, path: str | os.PathLike[str], *, quantize: bool = False, compare: bool = True
    ) -> MergeReport:
        """Write the merged model as a plain Transformers checkpoint; the adapter stays as it is.

        ``from_pretrained`` loads it with nothing of drlora installed. Where the experts are packed
        (4 bits, FP8, MXFP4), they are unpacked, merged and written a layer at a time; else the
        adapted weights are kept twice while they are written, as in :meth:`merge`.

        Args:
            path: the directory.
            quantize: pack experts of 4 bits again, which rounds a second time: the report says
                how much of the update that costs. Loading needs drlora then.
            compare: run the written model beside this one on a few random tokens, before it takes
                the place of older files. It is loaded on the CPU, if it fits into memory.

        Returns:
            How the experts are stored, and what rounding has done to the update.

        Raises:
            AttachError: the adapter is merged already, was detached, is disabled, or another one
                is active.
            CheckpointError: nothing could be written (no space, no permission), or the written
                model does not compute what the adapted one does; older files are untouched.
            ModelError: the model is none of Transformers, or ``quantize`` does not apply to it.
        """
        sharded.check_whole(self._attached, "merge_and_save")
        return merge.merge_and_save(self._attached, Path(path), quantize=quantize, compare=compare)

    def export_peft(
        self, path: str | os.PathLike[str], *, rank: int | None = None, per_expert: bool = False
    ) -> ExportReport:
        """Write a standard PEFT LoRA directory, which ``PeftModel.from_pretrained`` loads.

        Args:
            path: the directory.
            rank: compress every expert to this rank, by its singular values; default: keep all.
                Where PEFT has one rank for all experts of a layer, smaller ones are padded with
                zeros.
            per_expert: one LoRA per expert and projection (``experts.0.gate_proj.lora_A.weight``),
                as engines read them that go by the names of checkpoints; default: as PEFT itself
                adapts such a model.

        Returns:
            The ranks written, and the relative error of every expert.

        Raises:
            CheckpointError: nothing could be written, PEFT cannot adapt these experts (DBRX), or
                ``rank`` is below ``attention_rank`` with ``per_expert``.
            ModelError: experts declared by ``register_moe`` have no name in their block.
        """
        check_attached(self._attached)
        sharded.check_whole(self._attached, "export_peft")
        travel.settle(self._attached)
        return exporting.export(self._attached, Path(path), rank, per_expert)

    def import_peft(self, path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
        """Start from a PEFT adapter of the experts, in any layout that :meth:`export_peft` writes.

        Where its rank is above that of an expert, or of a Linear above ``attention_rank``, the best
        approximation of the lower rank is taken, which is nothing for rank 0.

        Returns:
            Relative Frobenius error of B A by layer, projection and expert, and of the dense
            Linears by name, ``weight`` and 0; 0 where nothing was lost.

        Raises:
            CheckpointError: it is damaged, does not fit or no expert has rank; nothing was changed.
            AttachError: the adapter has made a step already.
        """
        check_attached(self._attached)
        sharded.check_whole(self._attached, "import_peft")
        return importing.start_from(self._attached, Path(path))


def state_of(adapter: Adapter) -> Attached:
    """The state behind a handle, for integrations that call operations themselves."""
    return adapter._attached
