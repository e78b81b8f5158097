"""A profile: the statistics of a model on some batches, before it is trained and without a change.

It says how often the routers use each expert on the data, and how strongly each expert's weights
would be pulled: what ``AllocatorEngine.from_profile`` chooses starting ranks by.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError, Recording, StatisticError
from drlora_core.ema import FloatArray
from drlora_torch.adapter import Adapter, state_of
from drlora_torch.api import adapters, attach
from drlora_torch.errors import AttachError, ModelError, explain_keywords
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.signals import ImportanceSignal, RoutingSignal, choose_importance
from drlora_torch.step.processes import is_first_process
from drlora_torch.weight_gradients import WeightGradients

WEIGHT_GRADIENT = "weight_gradient"

ZERO_AT_START = ("sensitivity", "sensitivity_per_token", "update_norm")
"""Signals with a factor B, which is 0 in a profile."""


@explain_keywords
def profile(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    output: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
    importance: str | ImportanceSignal = "gradient",
    routing: str | RoutingSignal = "weight",
    seed: int = 0,
) -> Recording:
    """Measure routing and importance of every expert in one pass over some batches.

    A LoRA of rank 1 whose B stays 0 is attached for the time of the pass. It changes no output, and
    the gradient of its B is that of the expert's weights, seen through a random direction (A). The
    model is as before afterwards, bit for bit, and so are its gradients and the random state.

    Args:
        model: a Transformers model as for :func:`drlora_torch.attach`, without an adapter; in one
            process, or one that several processes hold together. Its mode is kept.
        batches: keyword arguments of the model, with ``labels``; tensors are moved to its device.
            A batch is a step of the recording.
        output: new or empty folder to write the recording to, for ``from_profile`` and the commands
            ``drlora replay`` and ``drlora report``.
        layers: name patterns, as for ``attach``.
        importance: a signal, as for ``attach``: ``gradient`` or ``fisher``, or your own. Others are
            0 where B is 0. ``weight_gradient`` is the Frobenius norm of the gradient of an expert's
            weights, all projections together: a second pass, without the LoRA, and memory for
            the gradient of one parameter; not for packed or spread weights.
        routing: a signal, as for ``attach``.
        seed: of A.

    Returns:
        The statistics, a step per batch; it has no configuration of its own.

    Raises:
        AttachError: the model has an adapter.
        ModelError: no MoE layer, no batch, or a batch that is no mapping or gives no loss.
        StatisticError: a signal that is not known, or always 0.
        LayoutError: ``output`` is not empty.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> model = OlmoeForCausalLM(OlmoeConfig(hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        ...     num_experts_per_tok=2, vocab_size=16))
        >>> ids = torch.arange(10).reshape(2, 5)
        >>> recording = profile(model, [{"input_ids": ids, "labels": ids}])
        >>> config = AllocatorConfig(r_init=0, r_target=4, r_max=16, policy="uniform")
        >>> engine = AllocatorEngine.from_profile(config, recording, "profile")
        >>> adapter = attach(model, engine)
        >>> int(adapter.ranks()["model.layers.0.mlp.experts"].sum())
        16
    """
    whole = importance == WEIGHT_GRADIENT
    _check(model, "gradient" if whole else importance, output)
    config = AllocatorConfig(
        r_init=1, r_target=1, r_max=1, policy="uniform", warmup_steps=0, growth_end=0, seed=seed
    )
    engine = AllocatorEngine(config)
    with tempfile.TemporaryDirectory() as folder, _random_state_kept(model):
        adapter = attach(
            model,
            engine,
            alpha=1.0,
            auto_step=False,
            layers=layers,
            importance="gradient" if whole else importance,
            routing=routing,
        )
        try:
            engine.record_to(Path(folder, "profile"))
            gradients = WeightGradients(adapter.layers) if whole else None
            steps, norms = _measure(model, adapter, batches, gradients)
        finally:
            engine.record_to(None)
            adapter.detach()
        if not steps:
            raise ModelError("there are no batches to profile the model on")
        measured = Recording.open(Path(folder, "profile"))
    importance_of = measured.importance
    if whole:  # a batch that was skipped has no importance
        importance_of = np.where(np.isnan(importance_of), np.nan, np.stack(norms))
    recording = Recording(
        layers=measured.layers,
        routing=measured.routing,
        importance=importance_of,
        presence=measured.presence,
        tokens=measured.tokens,
    )
    if output is not None and is_first_process():
        recording.save(output)
    return recording


def _check(model: nn.Module, importance: object, output: str | os.PathLike[str] | None) -> None:
    """Refuse what cannot work, before anything is done."""
    if known := adapters(model):
        raise AttachError(
            f"the model has an adapter ({', '.join(known)}), and a profile is of a model without "
            "one; call its detach() first"
        )
    chosen = choose_importance(importance)
    if not chosen.own and chosen.name in ZERO_AT_START:
        raise StatisticError(
            f"importance={chosen.name!r} is 0 for every expert before the training, when B is 0; "
            "use 'gradient' or 'fisher'"
        )
    if output is not None:
        path = Path(output)
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise LayoutError(f"{path} is not empty; choose a new path for the profile")


def _measure(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Mapping[str, Any]],
    gradients: WeightGradients | None,
) -> tuple[int, list[FloatArray]]:
    """Run forward and backward on each batch.

    Returns:
        How many there were, and the norms of ``gradients`` in each, over the experts of all layers.
    """
    active_tracker(state_of(adapter)).silence("evaluation")  # nothing is trained
    parameters, steps, norms = adapter.parameters(), 0, []
    device = parameters[0].device
    for batch in tqdm(batches, desc="profile", disable=None):  # a bar on terminals
        steps += 1
        if not isinstance(batch, Mapping):
            raise ModelError(
                f"batch {steps} is a {type(batch).__name__}; batches must be an iterable of dicts "
                "with keyword arguments of the model"
            )
        given = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
        _backward(model, given, steps)
        adapter.step()
        for parameter in parameters:
            parameter.grad = None
        if gradients is not None:
            with adapter.disabled(), gradients:
                _backward(model, given, steps)
                norms.append(torch.cat(list(gradients.take().values())).numpy())
    return steps, norms


def _backward(model: nn.Module, batch: Mapping[str, Any], number: int) -> None:
    with torch.enable_grad():
        loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ModelError(
            f"batch {number} gives no loss: batches need labels beside {sorted(batch)}"
        )
    loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Dropout and jitter draw random numbers in training mode; give them back."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=list(devices), device_type=kind):
        yield
