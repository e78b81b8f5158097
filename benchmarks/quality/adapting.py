"""Add the trainable parameters of a method to a model, and remove them again."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import drlora_torch
from benchmarks.quality.errors import StudyError
from benchmarks.quality.interventions import INTERVENTIONS, Around
from benchmarks.quality.policies import POLICIES, STARTING, probed, toward
from benchmarks.quality.profiling import Arrays
from benchmarks.quality.records import Method
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.errors import near_misses

HINDSIGHT = "final_ranks"
Profile = Callable[[str], Arrays]
"""Name of a signal to its values by layer, [N], for methods that choose ranks before training. The
signals are those of ``profiling.PROFILES``, and ``HINDSIGHT``: the final ranks of another run."""


class RefusedError(Exception):
    """A library cannot adapt this model; the message is that of the library."""


@dataclasses.dataclass(frozen=True, slots=True)
class Adapted:
    """A model that is ready for training."""

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    ranks: Callable[[], Arrays]
    """Current ranks by layer, [N]."""
    trained: Callable[[], int]
    """Current number of trainable parameters."""
    adapter: drlora_torch.Adapter | None = None
    around_step: Around = contextlib.nullcontext
    """Wraps every optimizer step."""


@contextlib.contextmanager
def adapted(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """Adapt the model by the method; on exit, restore it bit for bit.

    Args:
        method: how to adapt.
        model: a model with mixture-of-experts layers.
        config: configuration of the allocation.
        alpha: LoRA weights are scaled by alpha / r_target.
        profile: gives a signal before training.

    Raises:
        RefusedError: the library of the method cannot adapt this model.
        StudyError: unknown kind of method, or unknown policy.
    """
    check_kind(method)
    with KINDS[method.base_kind](method, model, config, alpha, profile) as ready:
        if method.intervention is None:
            yield ready
        else:
            around = INTERVENTIONS[method.intervention](ready.adapter, config)
            yield dataclasses.replace(ready, around_step=around)


def check_kind(method: Method) -> None:
    """Check the kind of a method and its intervention.

    Raises:
        StudyError: there is none of that name, or no intervention is possible.
    """
    for what, name, known in (
        ("kind", method.base_kind, KINDS),
        ("intervention", method.intervention, INTERVENTIONS),
    ):
        if name is not None and name not in known:
            hint = near_misses(name, known)
            raise StudyError(f"method {method.name!r}: no {what} {name!r}; {hint}")
    if method.intervention is not None and method.base_kind.startswith("peft"):
        raise StudyError(f"method {method.name!r}: interventions need a LoRA of drlora")


def find_policy(method: Method) -> Any:
    """The policy of a method if it is one of ``policies.py``, or a starting one; else None.

    Raises:
        StudyError: there is no policy of that name.
    """
    known = STARTING if method.base_kind == "from_profile" else POLICIES
    if method.policy is not None and method.policy not in known:
        raise StudyError(f"no policy {method.policy!r}; {near_misses(method.policy, known)}")
    return None if method.policy is None else known[method.policy]


@contextlib.contextmanager
def _drlora(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    engine = AllocatorEngine(config, policy=find_policy(method))
    with _attached(method, model, engine, alpha) as ready:
        yield ready


@contextlib.contextmanager
def _static(
    signal: str,
    method: Method,
    model: nn.Module,
    config: AllocatorConfig,
    alpha: float,
    profile: Profile,
) -> Iterator[Adapted]:
    """Feed the signal to the engine and let its only event choose the ranks before training."""
    engine = AllocatorEngine(config, policy=find_policy(method))
    measured = profile(signal)
    for name, values in measured.items():
        engine.add_layer(name, num_experts=values.size)
    for name, values in measured.items():
        rest = np.ones_like(values)
        routing, importance = (values, rest) if signal == "routing" else (rest, values)
        engine.observe(name, routing=routing, importance=importance)
    engine.step()
    chosen = AllocatorEngine(config)  # its event has nothing left to place
    for name, values in measured.items():
        chosen.add_layer(name, num_experts=values.size, ranks=engine.ranks(name))
    with _attached(method, model, chosen, alpha) as ready:
        yield ready


@contextlib.contextmanager
def _hindsight(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """Start with the final ranks of another run."""
    engine = AllocatorEngine(config)  # its events have nothing left to place
    for name, ranks in profile(HINDSIGHT).items():
        engine.add_layer(name, num_experts=ranks.size, ranks=ranks)
    with _attached(method, model, engine, alpha) as ready:
        yield ready


@contextlib.contextmanager
def _from_profile(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """Start with the ranks that a policy of drlora chooses by the routing before training."""
    statistics = {name: (routing, None) for name, routing in profile("routing").items()}
    engine = AllocatorEngine.from_profile(config, statistics, find_policy(method))
    with _attached(method, model, engine, alpha) as ready:
        yield ready


@contextlib.contextmanager
def _probed(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """Grow from rank 0, with gradients measured before training as importance there."""
    probe = profile("gradient")
    engine = AllocatorEngine(config, policy=probed(list(probe.values())))
    for name, values in probe.items():
        engine.add_layer(name, num_experts=values.size)
    with _attached(method, model, engine, alpha) as ready:
        yield ready


@contextlib.contextmanager
def _known_ranks(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """Grow to the final ranks of another run, in random order."""
    ranks = profile(HINDSIGHT)
    engine = AllocatorEngine(config, policy=toward(list(ranks.values())))
    for name, values in ranks.items():
        engine.add_layer(name, num_experts=values.size)
    with _attached(method, model, engine, alpha) as ready:
        yield ready


@contextlib.contextmanager
def _attached(
    method: Method, model: nn.Module, engine: AllocatorEngine, alpha: float
) -> Iterator[Adapted]:
    shapes = {layer.name: layer.projections.values() for layer in drlora_torch.discover(model)}
    adapter = drlora_torch.attach(model, engine, alpha=alpha, **method.attach)

    def trained() -> int:
        lora = sum(
            int(ranks.sum()) * sum(sum(shape) for shape in shapes[name])
            for name, ranks in adapter.ranks().items()
        )
        return lora + sum(p.numel() for p in adapter.router_parameters().values())

    try:
        yield Adapted(model, adapter.parameters(), adapter.ranks, trained, adapter)
    finally:
        adapter.detach()


@contextlib.contextmanager
def _peft_lora(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """PEFT's LoRA by ``target_parameters``, starting from the same A as ours."""
    from peft import PeftModel

    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls an old name
        adapter = drlora_torch.attach(model, AllocatorEngine(config), alpha=alpha, **method.attach)
        try:
            ranks = adapter.ranks()
            adapter.export_peft(Path(folder) / "start")
        finally:
            adapter.detach()
        wrapped = PeftModel.from_pretrained(model, Path(folder) / "start", is_trainable=True)
    try:
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        trained = sum(parameter.numel() for parameter in parameters)
        yield Adapted(wrapped, parameters, lambda: ranks, lambda: trained)
    finally:
        wrapped.unload()
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextlib.contextmanager
def _peft_adalora(
    method: Method, model: nn.Module, config: AllocatorConfig, alpha: float, profile: Profile
) -> Iterator[Adapted]:
    """PEFT's AdaLoRA, by ``target_parameters`` and by ``target_modules``: neither works."""
    from peft import AdaLoraConfig, get_peft_model

    records = drlora_torch.discover(model)
    targets = [f"{record.name}.{name}" for record in records for name in record.projections]
    kinds = sorted({target.rpartition(".")[2] for target in targets})
    for way in ({"target_parameters": targets}, {"target_modules": kinds}):
        try:
            get_peft_model(
                model,
                AdaLoraConfig(
                    init_r=2 * config.r_target,
                    target_r=config.r_target,
                    lora_alpha=alpha,
                    tinit=1,
                    tfinal=1,
                    total_step=4,
                    **way,
                ),
            )
        except Exception as error:  # any error of PEFT is the result
            refusal = f"{next(iter(way))}: {type(error).__name__}: {error}"
            if "target_parameters" in way:
                first = refusal
            continue
        raise StudyError(
            f"PEFT's AdaLoRA now accepts {next(iter(way))} of this model; implement the kind "
            "'peft_adalora' in benchmarks/quality/adapting.py"
        )
    raise RefusedError(f"{first}; {refusal}")
    yield  # makes this a generator


KINDS: Mapping[str, Callable[..., contextlib.AbstractContextManager[Adapted]]] = {
    "drlora": _drlora,
    "static_profile": partial(_static, "routing"),
    "static_gradient": partial(_static, "gradient"),
    "from_profile": _from_profile,
    "hindsight": _hindsight,
    "known_ranks": _known_ranks,
    "probed": _probed,
    "peft_lora": _peft_lora,
    "peft_adalora": _peft_adalora,
}
"""Values of ``Method.base_kind``."""
