"""``attach``: freeze a model, give its experts LoRA, and start observing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from drlora_core import AllocatorEngine
from drlora_core.errors import LayoutError, UnknownLayerError, near_misses
from drlora_torch.adapter import AdaptedLayer, Adapter
from drlora_torch.distributed import is_first_process
from drlora_torch.errors import AttachError, ModelError
from drlora_torch.integrations.beside_peft import unwrapped
from drlora_torch.kernels import Kernel, grouped
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.discovery import adaptable
from drlora_torch.models.records import MoELayer
from drlora_torch.named import NamedAdapters, check_name
from drlora_torch.options import AdapterOptions, RouterMode
from drlora_torch.slots import Layout, SlotTable


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
    auto_step: bool = True,
    newborn: Literal["corrected", "plain"] = "corrected",
    rslora: bool = False,
    kernel: Literal["auto", "ragged", "grouped"] = "auto",
    record: str | None = None,
) -> Adapter:
    """Freeze a model, add LoRA with dynamic ranks to its experts, and start observing.

    Nothing changes in the training loop: statistics, growth and newborn dimensions follow the
    steps of the optimizer that holds ``adapter.parameters()``.

    Args:
        model: a Transformers model with mixture-of-experts layers, or a PeftModel around one,
            whose own adapters then stay trainable.
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
        auto_step: False if you call ``adapter.step()`` yourself after each optimizer step.
        newborn: ``corrected``: rows born late move under Adam as if their step count had just
            begun; ``plain``: the optimizer is left alone.
        rslora: scale by alpha / sqrt(r_target) instead.
        kernel: ``ragged`` loops over experts and takes all dtypes; ``grouped`` uses torch's
            ``grouped_mm``; ``auto`` takes ``grouped`` on GPUs. Results are equal to rounding.
        record: directory for a recording of all statistics, see ``engine.record_to``.

    Returns:
        The adapter, a handle to ranks, saving, merging and detaching.

    Raises:
        ModelError: no MoE layer, or one that cannot be adapted.
        AttachError: the model has an adapter of this name already.
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
            "auto_step": auto_step,
            "newborn": newborn,
            "rslora": rslora,
            "kernel": kernel,
        }
    )
    model = unwrapped(model)
    records = adaptable(model, options.layers)
    named = NamedAdapters.of(model)
    check_name(adapter_name, named.by_name)
    _check_free(named, engine)
    _check_layers(model, records, options)
    _check_engine(engine, records)
    if record is not None and is_first_process():
        engine.record_to(record)
    _add_layers(engine, records)
    adapted = {record.name: _adapt(model, record, engine, options) for record in records}
    adapter = Adapter(adapter_name, model, engine, options, adapted)
    named.add(adapter)
    return adapter


def _adapt(
    model: nn.Module, record: MoELayer, engine: AllocatorEngine, options: AdapterOptions
) -> AdaptedLayer:
    """Make the LoRA of a layer; the model is not changed yet."""
    config = engine.config
    experts = model.get_submodule(record.name)
    layout = Layout(options.layout)
    per_expert = config.r_max if layout is Layout.MASKED else config.mean_rank_ceiling
    table = SlotTable(record.num_experts * per_expert, record.num_experts, config.r_max, layout)
    table.grow(engine.ranks(record.name))
    lora = ExpertLoRA(
        record.name,
        {n: s for n, s in record.projections.items() if n in (options.targets or (n,))},
        table,
        options.scaling(config),
        options.dropout,
        config.seed,
        options.kernel,
    )
    convention = convention_of(experts)
    assert convention is not None
    weight = convention.first_weight(experts)
    assert weight is not None
    lora.to(device=weight.device, dtype=options.lora_dtype(weight.dtype))
    router = None if record.router is None else model.get_submodule(record.router)
    return AdaptedLayer(record, experts, lora, router)


def _add_layers(engine: AllocatorEngine, records: list[MoELayer]) -> None:
    for layer in records:
        if layer.name not in engine.layer_names:
            engine.add_layer(layer.name, layer.num_experts)


def _check_free(named: NamedAdapters, engine: AllocatorEngine) -> None:
    """A model takes another adapter if that brings its own engine."""
    known = named.by_name.values()
    own = {id(layer.lora) for adapter in known for layer in adapter.layers.values()}
    if any(isinstance(m, ExpertLoRA) and id(m) not in own for m in named.model.modules()):
        raise AttachError(
            "the model has an adapter already, attached to a part of it or to a model around it; "
            "call its detach() first, or attach both to the same model"
        )
    for adapter in known:
        if adapter.engine is engine:
            raise AttachError(
                f"this engine decides the ranks of adapter {adapter.name!r}; give each adapter an "
                "AllocatorEngine of its own"
            )
    named.check_not_disabled()


def _check_layers(model: nn.Module, records: list[MoELayer], options: AdapterOptions) -> None:
    _check_beside_peft(records)
    _check_targets(records, options.targets)
    _check_routers(records, options)
    _check_kernel(model, records, options)


def _check_beside_peft(records: list[MoELayer]) -> None:
    for record in records:
        if record.name.endswith(".base_layer"):
            raise AttachError(
                f"PEFT adapts the experts of {record.name.replace('.base_layer', '')!r} itself; "
                "leave them out of its target_parameters, or merge its adapter first"
            )


def _check_targets(records: list[MoELayer], targets: Sequence[str] | None) -> None:
    known = sorted({name for record in records for name in record.projections})
    for target in targets or ():
        if target not in known:
            raise UnknownLayerError(f"no projection {target!r}; {near_misses(target, known)}")
    for record in records:
        if targets is not None and not set(targets) & set(record.projections):
            raise UnknownLayerError(f"layer {record.name!r} has none of the targets {targets}")


def _check_routers(records: list[MoELayer], options: AdapterOptions) -> None:
    missing = [record.name for record in records if record.router is None]
    if options.router is not RouterMode.FROZEN and missing:
        raise ModelError(
            f"router={options.router.value!r} needs the routers, but none was found for "
            f"{missing[0]!r}; use router='frozen'"
        )


def _check_kernel(model: nn.Module, records: list[MoELayer], options: AdapterOptions) -> None:
    if options.kernel is not Kernel.GROUPED:
        return
    for record in records:
        experts = model.get_submodule(record.name)
        for projection in record.projections:
            weight = getattr(experts, projection, None)
            if not isinstance(weight, torch.Tensor) or not grouped.supports(weight):
                found = "none" if weight is None else f"{record.dtype}{list(weight.shape)}"
                raise AttachError(
                    f"kernel='grouped' cannot multiply {record.name}.{projection}, {found}: it "
                    "takes float32, bfloat16 and float16 with rows of a multiple of 16 bytes; use "
                    "kernel='ragged'"
                )


def _check_engine(engine: AllocatorEngine, records: list[MoELayer]) -> None:
    """An engine comes empty, or with exactly the model's layers (a resumed one)."""
    if not engine.layer_names:
        return
    wanted = {record.name: record.num_experts for record in records}
    own = {name: engine.num_experts(name) for name in engine.layer_names}
    if own != wanted:
        differing = sorted(
            name for name in own.keys() | wanted if own.get(name) != wanted.get(name)
        )
        raise LayoutError(
            f"the engine's layers are not the model's: {differing[0]!r} has "
            f"{own.get(differing[0], 'no')} experts in the engine and "
            f"{wanted.get(differing[0], 'none')} in the model; use a new AllocatorEngine"
        )
