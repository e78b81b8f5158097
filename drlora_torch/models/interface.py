"""Experts modules that follow the experts interface of Transformers 5, adapted in one place.

The interface (``use_experts_implementation``) declares the layout by flags on the module:
``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``. Its forward looks up
``config._experts_implementation`` in a public registry. We register one function there and give
each adapted module a private copy of its config that names it: the model's own config, its other
modules and other models are untouched, no forward is patched, no base parameter is renamed.

Shape letters: T tokens, K experts per token, H model width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from drlora_torch.lora import parts
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.triton_use import runs_triton
from drlora_torch.models.convention import ATTACHMENT, Observer, Undo, give_lora
from drlora_torch.models.fused import Fused, Packed
from drlora_torch.models.location import ExpertParameter

IMPLEMENTATION = "drlora"
PACKED = "drlora_packed"
BASE_CONFIG = "_drlora_base_config"  # set on adapted modules beside their attachment
PLAIN_CONFIG = "_drlora_plain_config"  # set on modules with packed weights


def _weights(module: Any) -> dict[str, ExpertParameter]:
    return {
        name: ExpertParameter(
            name=name,
            transposed=module.is_transposed,
            interleaved=not getattr(module, "is_concatenated", True),
        )
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    }


def _install(convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
    _registry(module).register(IMPLEMENTATION, experts_forward)
    base_config = module.config
    config = copy.deepcopy(base_config)
    config._experts_implementation = IMPLEMENTATION
    remove_lora = give_lora(module, lora, observer)
    vars(module)[BASE_CONFIG] = base_config
    module.config = config
    stop_counting = _count_before_dispatch(module, lora, observer)

    def remove() -> None:
        stop_counting()
        module.config = base_config
        del vars(module)[BASE_CONFIG]
        remove_lora()

    return remove


def is_expert_parallel(module: Any) -> bool:
    """True if Transformers has given the experts of a layer to several processes."""
    return bool(getattr(module, "_is_expert_parallel", False))


def _count_before_dispatch(module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
    """Count the routing of a process's own tokens: its experts see those of others.

    How the tokens get there differs with the layer, and so do the indices that experts see.
    """
    if not is_expert_parallel(module):
        return lambda: None
    parameters = inspect.signature(module.forward)

    def count(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if observer.enabled:
            _, index, weights = parameters.bind(*args, **kwargs).arguments.values()
            observer.routed(lora, output, index, parts.local(weights))

    handle = module.register_forward_hook(count, with_kwargs=True)
    return cast("Undo", handle.remove)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts with LoRA on tokens [T, H] and their routing [T, K]; gives [T, H].

    Transformers calls it instead of its eager or grouped experts.
    """
    lora, observer = getattr(module, ATTACHMENT)
    if not observer.enabled:
        return _run_base(module, hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_compiling():  # a graph must not change with the ranks
        run = _run if lora.fits_in_graph(INTERFACE.weights(module)) else _run_outside
        output = run(module, lora, hidden_states, top_k_index, top_k_weights)
    elif lora.is_idle:
        output = lora.tie(_run_base(module, hidden_states, top_k_index, top_k_weights))
    else:
        output = _run(module, lora, hidden_states, top_k_index, top_k_weights)
    if is_expert_parallel(module):  # it is counted before the tokens travel
        return output
    counted: Tensor = observer.routed(lora, output, top_k_index, top_k_weights)
    return counted


def _run_base(module: Any, *inputs: Tensor) -> Tensor:
    """The experts as the model itself runs them."""
    own = type(module).forward.__wrapped__
    chosen = vars(module)[BASE_CONFIG]._experts_implementation
    base: Callable[..., Tensor] = _registry(module).get_interface(chosen, own)
    return base(module, *inputs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same without LoRA, for weights that the implementations of Transformers cannot read."""
    return _run(module, None, hidden_states, top_k_index, top_k_weights)


def _run(
    module: Any, lora: ExpertLoRA | None, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    first, second = INTERFACE.weights(module)
    bias_1, bias_2 = (
        getattr(module, f"{name}_bias") if module.has_bias else None for name in (first, second)
    )
    count = INTERFACE.num_experts(module) if lora is None else lora.num_local_experts
    normed = getattr(module, "has_post_expert_norm", False)  # newer than some Transformers
    sentinels = normed or is_expert_parallel(module)  # else pairs are summed right away
    dispatch = Dispatch.sort(index, count, sentinels=sentinels)
    project = INTERFACE.projector(module, lora, dispatch)
    rows = project(first, tokens, bias_1, gather=True)
    rows = _activate(module, rows)
    if normed:
        rows = module.post_expert_norm(project(second, rows, bias_2))
        output = dispatch.combine(rows, weights)
    else:
        output = project(second, rows, bias_2, routing_weights=weights)
    return output.to(tokens.dtype)


_run_outside = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]


def _activate(module: Any, rows: Tensor) -> Tensor:
    """The activation between the projections, [S, 2I] (or [S, I] without a gate) -> [S, I]."""
    if not module.has_gate:
        activated: Tensor = module.act_fn(rows)
        return activated
    plain = type(module)._apply_gate.__name__ == "_default_apply_gate"
    if plain and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)) and runs_triton(rows):
        from drlora_torch.lora.kernels.gate import silu_and_multiply

        return silu_and_multiply(rows)
    gated: Tensor = module._apply_gate(rows)
    return gated


def _start_packed(module: Any) -> None:
    _registry(module).register(PACKED, packed_forward)
    vars(module)[PLAIN_CONFIG] = module.config
    module.config = copy.deepcopy(module.config)
    module.config._experts_implementation = PACKED


def _stop_packed(module: Any) -> None:
    module.config = vars(module).pop(PLAIN_CONFIG)


def _registry(module: Any) -> Any:
    """Where the forward of a module looks up its implementation."""
    if module.__class__.__name__ == "FP8Experts":
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

        return ALL_FP8_EXPERTS_FUNCTIONS
    return ALL_EXPERTS_FUNCTIONS


def _unfit(module: Any) -> str | None:
    """Why the weights of a module are not what its flags say."""
    if module.config._experts_implementation == "deepgemm_megamoe":
        return (
            "is laid out for the kernel DeepGEMM Mega MoE, which has no backward; load the model "
            "with experts_implementation='grouped_mm'"
        )
    return None


INTERFACE = Fused(
    name="interface",
    matches=lambda module: {"is_transposed", "has_gate", "config"} <= vars(module).keys(),
    weights=_weights,
    install_into=_install,
    unfit=_unfit,
    packed=Packed(_start_packed, _stop_packed),
)
