"""``attach``: freeze a model, give its experts LoRA, and start observing."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from drlora_core import AllocatorEngine
from drlora_core.errors import LayoutError, UnknownLayerError, near_misses
from drlora_torch.adapter import AdaptedLayer, Adapter
from drlora_torch.distributed import is_first_process
from drlora_torch.errors import AttachError, ModelError
from drlora_torch.following import OptimizerFollower
from drlora_torch.importance import AccumulatedImportance
from drlora_torch.integrations.beside_peft import is_adapted, unwrapped
from drlora_torch.kernels import Kernel, grouped
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.convention import CHILD, is_attached
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.discovery import adaptable
from drlora_torch.models.records import MoELayer
from drlora_torch.optimizer import NewbornCorrection
from drlora_torch.options import AdapterOptions, RouterMode
from drlora_torch.routing import ForwardWatch, RoutingCounter
from drlora_torch.slots import Layout, SlotTable


def attach(
    model: nn.Module,
    engine: AllocatorEngine,
    *,
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
        AttachError: the model has an adapter already.
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
    _check_free(model, records)
    _check_targets(records, options.targets)
    _check_routers(records, options)
    _check_kernel(model, records, options)
    _check_engine(engine, records)
    if record is not None and is_first_process():
        engine.record_to(record)
    for layer in records:
        if layer.name not in engine.layer_names:
            engine.add_layer(layer.name, layer.num_experts)
    return _build(model, engine, options, records)


def _build(
    model: nn.Module, engine: AllocatorEngine, options: AdapterOptions, records: list[MoELayer]
) -> Adapter:
    adapter = Adapter(model, engine, options)
    _install(adapter, {r.name: functools.partial(_adapt, model, r, adapter) for r in records})
    for name, parameter in adapter.router_parameters().items():
        adapter.router_base[name] = parameter.detach().clone()
    return adapter


def put_back(adapter: Adapter, layers: Mapping[str, AdaptedLayer]) -> None:
    """Put layers that a merge took out into the model again.

    Raises:
        AttachError: another adapter is in the model by now.
    """
    if any(is_attached(module) for module in adapter.model.modules()):
        raise AttachError("another adapter was attached to the model; call its detach() first")
    newborn = adapter.newborn
    _install(adapter, {n: functools.partial(_adapt_again, adapter, o) for n, o in layers.items()})
    adapter.newborn = newborn


def _install(adapter: Adapter, makers: Mapping[str, Callable[[], AdaptedLayer]]) -> None:
    """Change the model; every change is pushed with its undo, so a failure leaves no trace."""
    undo = adapter.undo
    try:
        undo.append(_freeze(adapter.model))
        for name, make in makers.items():
            layer = adapter.layers[name] = make()
            undo.append(layer.remove)
            adapter.counters[name] = RoutingCounter(layer.record.num_experts)
        undo.append(_keep_out_of_checkpoints(adapter.model))
        undo.append(_let_checkpointing_reach_lora(adapter.model))
        _start_observing(adapter)
        adapter.free_routers()
    except BaseException:
        adapter.take_out()
        raise


def _adapt_again(adapter: Adapter, layer: AdaptedLayer) -> AdaptedLayer:
    convention = convention_of(layer.experts)
    assert convention is not None
    weight = convention.first_weight(layer.experts)
    assert weight is not None
    layer.lora.to(device=weight.device)
    layer.lora.train(layer.experts.training)
    remove = convention.install(layer.experts, layer.lora, adapter)
    return dataclasses.replace(layer, remove=remove)


def _adapt(model: nn.Module, record: MoELayer, adapter: Adapter) -> AdaptedLayer:
    config, options = adapter.engine.config, adapter.options
    experts = model.get_submodule(record.name)
    layout = Layout(options.layout)
    per_expert = config.r_max if layout is Layout.MASKED else config.mean_rank_ceiling
    table = SlotTable(record.num_experts * per_expert, record.num_experts, config.r_max, layout)
    table.grow(adapter.engine.ranks(record.name))
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
    lora.train(experts.training)
    return AdaptedLayer(
        record=record,
        experts=experts,
        lora=lora,
        router=None if record.router is None else model.get_submodule(record.router),
        remove=convention.install(experts, lora, adapter),
    )


def _start_observing(adapter: Adapter) -> None:
    loras = [layer.lora for layer in adapter.layers.values()]
    adapter.newborn = NewbornCorrection(loras)
    adapter.watch = ForwardWatch(adapter.model, adapter.layers)
    adapter.undo.append(adapter.watch.remove)
    if not adapter.options.auto_step:
        adapter.accumulated = AccumulatedImportance(loras)
        adapter.undo.append(adapter.accumulated.remove)
    # The garbage collector does not see through these hooks: a strong reference would keep the
    # model alive for ever.
    seen_by = weakref.WeakMethod(adapter.backward_seen)

    def seen_backward(parameter: torch.Tensor) -> None:
        if (backward_seen := seen_by()) is not None:
            backward_seen(parameter)

    parameter = next(loras[0].parameters())
    seen = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        seen_backward
    )
    adapter.undo.append(seen.remove)
    adapter.undo.append(OptimizerFollower(adapter).remove)


def _freeze(model: nn.Module) -> Callable[[], None]:
    if is_adapted(model):  # PEFT has frozen the base; what it trains goes on
        return lambda: None
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)

    def thaw() -> None:
        for parameter, required in before:
            parameter.requires_grad_(required)

    return thaw


def _keep_out_of_checkpoints(model: nn.Module) -> Callable[[], None]:
    """Leave the LoRA out of ``model.save_pretrained``, which then writes the base model.

    Transformers keeps a set of names for that on every ``PreTrainedModel``.
    """
    attribute = "_keys_to_ignore_on_save"
    before: list[tuple[Any, Any]] = []
    inherited = object()
    for module in model.modules():
        if hasattr(module, "save_pretrained") and hasattr(module, attribute):
            before.append((module, vars(module).get(attribute, inherited)))
            ours = {
                name
                for name, _ in module.named_parameters()
                if f".{CHILD}.projections." in f".{name}"
            }
            setattr(module, attribute, set(getattr(module, attribute) or ()) | ours)

    def restore() -> None:
        for module, value in before:
            if value is inherited:
                delattr(module, attribute)
            else:
                setattr(module, attribute, value)

    return restore


def _let_checkpointing_reach_lora(model: nn.Module) -> Callable[[], None]:
    """Reentrant checkpointing gives no gradient to layers whose inputs need none; make them."""

    def require_grad(module: nn.Module, args: object, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and _checkpoints_activations(model):
            output.requires_grad_(True)

    handles = [
        embeddings.register_forward_hook(require_grad) for embeddings in _input_embeddings(model)
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The token embeddings of a model and of its parts: an encoder and a decoder may differ."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        get_embeddings = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = None if get_embeddings is None else get_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Embedding) or (module is model and embeddings is not None):
            found[id(embeddings)] = embeddings
    return list(found.values())


def _checkpoints_activations(model: nn.Module) -> bool:
    """Ask a Transformers model, by the name of today or the one before 5.2x."""
    for attribute in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), attribute):
            return bool(getattr(model, attribute))
    return False


def _check_free(model: nn.Module, records: list[MoELayer]) -> None:
    if any(is_attached(module) for module in model.modules()):
        raise AttachError(
            "the model has an adapter already; call its detach() or merge() first (several "
            "adapters on one model are not supported)"
        )
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
