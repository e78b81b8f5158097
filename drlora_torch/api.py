"""The front door: functions that make, find and choose adapters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from drlora_core import AllocatorEngine, Policy
from drlora_core.errors import near_misses
from drlora_core.policies import check_callable
from drlora_core.recording.format import check_place
from drlora_torch.adapter import Adapter
from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError, ModelError, explain_keywords
from drlora_torch.lifecycle.build import build, draw
from drlora_torch.lifecycle.checks import (
    check_context,
    check_engine,
    check_free,
    check_layers,
    check_new,
)
from drlora_torch.lifecycle.residents import Residents, active_tracker, check_name
from drlora_torch.models.balancing import active_coefficient
from drlora_torch.models.discovery import choose_layers, discover
from drlora_torch.models.records import MoELayer
from drlora_torch.models.sharding import check_sharding, is_sharded, reshard
from drlora_torch.models.wrappers import check_parts, check_wrappers, unwrapped
from drlora_torch.options import AdapterOptions
from drlora_torch.signals import ImportanceSignal, RoutingSignal, refuse_named_only
from drlora_torch.step.notices import advise_against_balancing, tell_storage
from drlora_torch.step.processes import is_first_process, several_processes
from drlora_torch.step.sharded import meeting
from drlora_torch.storage import checkpoint, hub
from drlora_torch.storage.checkpoint_checks import Saved, find_signals
from drlora_torch.storage.entering import enter

__all__ = ["adapters", "attach", "discover", "load", "set_adapter"]


@explain_keywords
def attach(
    model: nn.Module,
    engine: AllocatorEngine,
    *,
    adapter_name: str = "default",
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    router: Literal["frozen", "after_warmup", "trainable"] = "frozen",
    layout: Literal["pooled", "masked"] = "pooled",
    dtype: torch.dtype | str | None = None,
    layers: Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    attention_rank: int | None = None,
    attention_alpha: float | None = None,
    attention_targets: Sequence[str] | None = None,
    auto_step: bool = True,
    newborn: Literal["corrected", "plain"] = "corrected",
    rslora: bool = False,
    kernel: Literal["auto", "ragged", "grouped"] = "auto",
    importance: str | ImportanceSignal = "sensitivity",
    routing: str | RoutingSignal = "weight",
    process_group: Any = None,
    record: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Freeze a model, add LoRA with dynamic ranks to its experts, and start observing.

    Nothing changes in the training loop: statistics, growth and newborn dimensions follow the
    steps of the optimizer that holds ``adapter.parameters()``.

    Args:
        model: a Transformers model with mixture-of-experts layers, or a PeftModel around one,
            whose own adapters then stay trainable, or ``torch.compile(model)``. Wrap it in
            ``DistributedDataParallel`` afterwards; ``fully_shard`` may come before or after.
        engine: decides the ranks; gets a layer per experts module, unless it has them already.
        adapter_name: tells it from other adapters of the model; the new one is the active one.
            Letters, digits, ``_`` and ``-``.
        alpha: scaling is alpha / r_target for every expert; default 2 * r_target.
        targets: names of the projections to adapt (``gate_up_proj``, ``down_proj``); default all.
        dropout: of the inputs of the low-rank part, in [0, 1).
        router: ``frozen``; ``after_warmup``: frozen for ``warmup_steps``, then trained;
            ``trainable``.
        layout: ``pooled``: memory of uniform LoRA at r_target, any free slot serves any expert;
            ``masked``: r_max slots per expert, as in the paper. Results are the same.
        dtype: of A and B; default that of the base weights, at least float32.
        layers: name patterns (``fnmatch``) of the layers to adapt, as ``discover`` names them;
            default all but routed attention.
        modules_to_save: names of other modules that are trained whole, as in PEFT (``score``,
            ``lm_head``, ``embed_tokens``; everything else of the base is frozen). They are in
            the adapter's file, in ``merge``, and in ``export_peft``.
        attention_rank: also add LoRA of this fixed rank to all dense Linears: attention, shared
            experts, dense layers. Routers, heads, what is used or shared at several places,
            indexers, Linears with a forward or a computed weight of their own, and those with a
            side of at most this rank are left out; the log says how many (INFO).
        attention_alpha: their scaling is alpha / attention_rank; default 2 * attention_rank.
        attention_targets: narrows them to these names, as in PEFT (``q_proj``, ``v_proj``).
        auto_step: False if you call ``adapter.step()`` yourself after each optimizer step.
        newborn: ``corrected``: rows born late move as if their own step count had just begun,
            under the optimizers that :class:`drlora_torch.options.Newborn` lists; ``plain``: the
            optimizer is left alone.
        rslora: scale by alpha / sqrt(r_target) instead.
        kernel: ``ragged`` loops over experts and takes all dtypes; ``grouped`` uses torch's
            ``grouped_mm``; ``auto`` takes ``grouped`` on GPUs. Results are equal to rounding.
        importance: what g averages: ``sensitivity``, ``sensitivity_per_token``, ``fisher``,
            ``gradient``, ``update_norm``, or your own :class:`~drlora_torch.ImportanceSignal`.
        routing: what f averages: ``weight``, ``margin``, ``count``, or your own
            :class:`~drlora_torch.RoutingSignal`.
        process_group: the processes of ``torch.distributed`` that train this adapter together,
            where others train something else; default: all.
        record: directory for a recording of all statistics, see ``engine.record_to``.

    Returns:
        The adapter, a handle to ranks, saving, merging and detaching.

    Raises:
        ModelError: no MoE layer, or one that cannot be adapted.
        AttachError: the model has an adapter of this name, the engine decides for another one or
            has made steps already, or the model is wrapped or spread for several processes in a
            way that cannot be followed.
        LayoutError: the engine has other layers.
        ValueError: an option out of range. The model and the engine are left unchanged.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> from drlora_core import AllocatorConfig
        >>> model = OlmoeForCausalLM(OlmoeConfig(hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        ...     num_experts_per_tok=2, vocab_size=16))
        >>> adapter = attach(model, AllocatorEngine(AllocatorConfig(r_init=2, r_target=4)))
        >>> adapter.ranks()
        {'model.layers.0.mlp.experts': array([2, 2, 2, 2])}
    """
    if not isinstance(engine, AllocatorEngine):
        raise AttachError(f"engine must be an AllocatorEngine, got {type(engine).__name__}")
    options = AdapterOptions.model_validate(
        {
            "alpha": 2.0 * engine.config.r_target if alpha is None else alpha,
            "targets": targets,
            "dropout": dropout,
            "router": router,
            "layout": layout,
            "dtype": dtype,
            "layers": layers,
            "modules_to_save": modules_to_save,
            "attention_rank": attention_rank,
            "attention_alpha": attention_alpha,
            "attention_targets": attention_targets,
            "auto_step": auto_step,
            "newborn": newborn,
            "rslora": rslora,
            "kernel": kernel,
            "importance": importance,
            "routing": routing,
        }
    )
    refuse_named_only(options.importance, options.routing)
    return _attach(model, engine, adapter_name, options, process_group, record)


@explain_keywords
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    policy: Policy | None = None,
    importance: str | ImportanceSignal | None = None,
    routing: str | RoutingSignal | None = None,
    trainable: bool = True,
    check_base: bool = True,
    revision: str | None = None,
    process_group: Any = None,
) -> Adapter:
    """Attach a saved adapter to its base model, ready to be used or trained further.

    Args:
        model: the base model, without an adapter of this name.
        path: the directory (or file) that ``adapter.save_pretrained`` wrote, the folder of a
            finished run of ``drlora finetune``, or the id of a repository on the Hugging Face hub
            that holds the adapter.
        adapter_name: as for :func:`attach`; the loaded adapter is the active one.
        policy: the callable that the run was made with, if it was: code is not saved, so without
            it the allocation goes on with ``config.policy``.
        importance: the callable of your own that the run was made with, if it was; code is not
            saved. Built-in signals are known by their saved names.
        routing: likewise.
        trainable: False to use it only: nothing is counted and nothing requires gradients.
        check_base: False to load onto a model whose expert weights are not those of the training.
        revision: branch, tag or commit, for a repository.
        process_group: as for :func:`attach`; all of its processes must call.

    Raises:
        CheckpointError: the file is missing, damaged, foreign or of another model. The model is
            left unchanged.
        AttachError: the model has an adapter of this name already.
    """
    holder, (model, found) = model, _look_inside(model)
    residents = Residents.of(model)
    check_name(adapter_name, residents.by_name)
    check_callable(policy)
    saved = _read(model, path, revision, process_group)
    engine = checkpoint.restore_engine(saved, policy)
    events = checkpoint.check(saved, engine, model, found, check_base)
    chosen: dict[str, Any] = {
        "layers": tuple(saved.layers),
        "attention_targets": saved.dense or None,
        **find_signals(saved, importance, routing, needed=trainable),
    }
    options = saved.options.model_copy(update=chosen)
    attached = _build(adapter_name, residents, engine, options, found, process_group)
    checkpoint.fill(attached, saved, events)
    attached.trainable, attached.paused = trainable, not trainable
    with _entered(residents, attached, holder):
        checkpoint.fill_trained(attached, saved)
        if trainable:
            active_tracker(attached).load_state_dict(saved.pending)
        return _handle(attached)


def _attach(
    holder: nn.Module,
    engine: AllocatorEngine,
    adapter_name: str,
    options: AdapterOptions,
    process_group: Any,
    record: str | os.PathLike[str] | None,
) -> Adapter:
    """Carry out :func:`attach` with validated options."""
    model, found = _look_inside(holder)
    residents = Residents.of(model)
    check_name(adapter_name, residents.by_name)
    check_new(engine)
    if record is not None and is_first_process(process_group):
        check_place(Path(record))
    attached = _build(adapter_name, residents, engine, options, found, process_group)
    draw(attached)
    with _entered(residents, attached, holder):
        _add_layers(attached)
        if record is not None and is_first_process(process_group):
            engine.record_to(record)
    advise_against_balancing(attached, active_coefficient(model))
    return _handle(attached)


def _read(
    model: nn.Module, path: str | os.PathLike[str], revision: str | None, group: Any
) -> Saved:
    """Read a file in every process that holds the model, or in none."""
    held = several_processes(group) and is_sharded(model)
    with meeting(group, "load") if held else contextlib.nullcontext():
        return checkpoint.read(hub.find(path, revision))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that are attached to a model, by name, in the order they came.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> from drlora_core import AllocatorConfig, AllocatorEngine
        >>> import drlora_torch
        >>> model = OlmoeForCausalLM(OlmoeConfig(hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        ...     num_experts_per_tok=2, vocab_size=16))
        >>> config = AllocatorConfig(r_init=2, r_target=4)
        >>> for name in ("law", "intent"):
        ...     adapter = drlora_torch.attach(model, AllocatorEngine(config), adapter_name=name)
        >>> {name: adapter.is_active for name, adapter in drlora_torch.adapters(model).items()}
        {'law': False, 'intent': True}
        >>> drlora_torch.set_adapter(model, "law").is_active
        True
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    known = Residents.of(unwrapped(model)).by_name
    return {name: _handle(attached) for name, attached in known.items()}


def set_adapter(model: nn.Module, adapter_name: str) -> Adapter:
    """Make the adapter of this name the active one; see :meth:`drlora_torch.Adapter.activate`.

    Returns:
        The adapter.

    Raises:
        AttachError: the model has no adapter of this name; the message lists near misses.
    """
    known = adapters(model)
    if adapter_name not in known:
        raise AttachError(f"no adapter {adapter_name!r}; {near_misses(str(adapter_name), known)}")
    known[adapter_name].activate()
    return known[adapter_name]


def _look_inside(model: nn.Module) -> tuple[nn.Module, list[MoELayer]]:
    """The model inside its wrappers, and its MoE layers; wrappers that cannot stay are refused."""
    check_context()
    check_wrappers(model)
    model = unwrapped(model)
    found = discover(model)
    check_sharding(model)
    reshard(model.modules())  # what is frozen must be what processes hold
    for layer in found:
        check_parts(model, layer.name)
    return model, found


def _build(
    name: str,
    residents: Residents,
    engine: AllocatorEngine,
    options: AdapterOptions,
    found: Sequence[MoELayer],
    process_group: Any,
) -> Attached:
    """Build an adapter for the chosen layers of those found, after every check."""
    model = residents.model
    records = choose_layers(model, found, options.layers)
    check_free(residents, engine)
    check_layers(model, records, options)
    check_engine(engine, records)
    attached = build(name, model, engine, options, records, found, process_group)
    tell_storage(attached)
    return attached


def _add_layers(attached: Attached) -> None:
    """Give an engine its layers, unless it came with them."""
    with attached.engine.driver.acting():
        for name, layer in attached.layers.items():
            if name not in attached.engine.layer_names:
                attached.engine.add_layer(name, layer.record.num_experts)


@contextlib.contextmanager
def _entered(residents: Residents, attached: Attached, holder: nn.Module) -> Iterator[None]:
    """Put an adapter into its model; if something fails inside, take it out again."""
    enter(residents, attached, holder)
    try:
        yield
    except BaseException:
        residents.remove(attached)
        raise


def _handle(attached: Attached) -> Adapter:
    """The one handle of an adapter."""
    if not isinstance(attached.handle, Adapter):
        attached.handle = Adapter(attached)
    assert isinstance(attached.handle, Adapter)
    return attached.handle
