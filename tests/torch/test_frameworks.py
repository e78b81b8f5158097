"""Frameworks that would not train the adapter are refused at the first step, by their names.

DeepSpeed and Megatron are stand-ins here, with the names of their modules and classes; the real
DeepSpeed is tested in test_deepspeed.py.
"""

from __future__ import annotations

import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import drlora_torch
from drlora_torch.integrations import checks
from tests.torch import helpers, models

RIGHT = r"right:\n    adapter = attach\(model, engine\)\n    parallel = DistributedDataParallel"
WRAPPER = """
    from torch import nn
    class {name}(nn.Module):
        def __init__(self, module, optimizer=None):
            super().__init__()
            self.module, self.optimizer = module, optimizer
        def forward(self, **batch):
            return self.module(**batch)
        def step(self):
            self.optimizer.step()
"""
OPTIMIZER = """
    class DeepSpeedOptimizer:
        def __init__(self, optimizer):
            self.optimizer = optimizer
    class FP16_UnfusedOptimizer(DeepSpeedOptimizer):
        def step(self):
            self.optimizer.step()
"""
STEPS = 5
Library = Callable[[str, str], Any]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Makes a module of another library, from its name and its source."""

    def make(name: str, source: str) -> Any:
        module = types.ModuleType(name)
        exec(textwrap.dedent(source), vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def deepspeed(library: Library) -> tuple[Any, Any]:
    """Its engine, and an optimizer of its own that steps what it is given."""
    engine = library("deepspeed.runtime.engine", WRAPPER.format(name="DeepSpeedEngine"))
    optimizer = library("deepspeed.runtime.base_optimizer", OPTIMIZER)
    return engine.DeepSpeedEngine, optimizer.FP16_UnfusedOptimizer


def megatron(library: Library) -> Any:
    source = WRAPPER.format(name="_BaseDataParallel")
    source += "    class DistributedDataParallel(_BaseDataParallel): ...\n"
    return library("megatron.core.distributed.data_parallel_base", source).DistributedDataParallel


def copies(adapter: drlora_torch.Adapter) -> torch.optim.AdamW:
    """An optimizer of copies of the LoRA, as mixed precision makes them."""
    own = [nn.Parameter(p.detach().clone()) for p in adapter.parameters()]
    for each in own:
        each.grad = torch.ones_like(each)
    return torch.optim.AdamW(own, lr=1e-2)


# -- attach, then the framework ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("ds_id", r"DeepSpeed \(ZeRO-3\) holds"),
        ("_hp_mapping", r"DeepSpeed \(ZeRO\) holds"),
        ("main_grad", "Megatron's data parallelism holds"),
    ],
)
def test_parameters_that_a_framework_took_over(mark: str, message: str) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    helpers.step(model, optimizer)
    for parameter in adapter.parameters():
        setattr(parameter, mark, 0)
    with pytest.raises(drlora_torch.AttachError, match=rf"{message}(.|\n)*{RIGHT}"):
        model(**helpers.batch())
    with torch.no_grad():
        assert torch.isfinite(model(**helpers.batch()).loss)  # evaluation needs no gradients
    marked = models.build()
    setattr(next(marked.parameters()), mark, 0)
    with pytest.raises(drlora_torch.AttachError, match=message):
        helpers.attach(marked)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_deepspeed_with_an_optimizer_of_its_own(library: Library, reentrant: bool | None) -> None:
    engine, optimizer = deepspeed(library)
    model = models.build()
    adapter = helpers.attach(model)
    if reentrant is not None:
        helpers.checkpoint_activations(model, reentrant=reentrant)
    whole = engine(model, optimizer(copies(adapter)))
    message = rf"DeepSpeed steps the model with its FP16_UnfusedOptimizer(.|\n)*{RIGHT}"
    with pytest.raises(drlora_torch.AttachError, match=message):
        whole(**helpers.batch())
    model(**helpers.batch()).loss.backward()  # around the engine
    with pytest.raises(drlora_torch.AttachError, match=message):
        whole.step()
    with pytest.raises(drlora_torch.AttachError, match=message):
        checks.check_optimizer(adapter, types.SimpleNamespace(optimizer=whole.optimizer))
    assert adapter.engine.step_count == 0


def test_deepspeed_with_an_optimizer_of_torch_trains(library: Library) -> None:
    """As ZeRO stage 0 does in float32."""

    def train(wrap: Callable[[Any, Any], Any]) -> tuple[list[float], Any]:
        model = models.build()
        adapter = helpers.attach(model)
        optimizer = helpers.adamw(adapter)
        whole = wrap(model, optimizer)
        losses = [helpers.step(whole, optimizer, seed) for seed in range(STEPS)]
        assert adapter.engine.step_count == STEPS
        return losses, helpers.rank_history(adapter)

    engine, _ = deepspeed(library)
    assert train(engine) == train(lambda model, _: model)


def test_megatron_runs_the_model(library: Library) -> None:
    model = models.build()
    helpers.attach(model)
    whole = megatron(library)(model)
    message = rf"Megatron trains the model \(megatron.core.distributed(.|\n)*{RIGHT}"
    with pytest.raises(drlora_torch.AttachError, match=message):
        whole(**helpers.batch())
    model(**helpers.batch())


@pytest.mark.parametrize("name", ["megatron.core.pipeline_parallel", "deepspeed.runtime.pipe"])
def test_a_pipeline_runs_the_model(library: Library, name: str) -> None:
    source = "def forward_step(model, batch): return model(**batch)"
    schedules = library(f"{name}.schedules", source)
    model = models.build()
    helpers.attach(model)
    message = rf"runs in a pipeline \({name}(.|\n)*{RIGHT}"
    with pytest.raises(drlora_torch.AttachError, match=message):
        schedules.forward_step(model, helpers.batch())


# -- the framework, then attach ----------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda library: deepspeed(library)[0], megatron])
def test_a_wrapper_of_a_framework_is_refused(
    library: Library, make: Callable[[Library], Any], tmp_path: Any
) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    whole = make(library)(model)
    assert drlora_torch.adapters(whole) == {"default": adapter}
    adapter.save_pretrained(tmp_path)
    fresh = make(library)(models.build())
    message = rf"wrapped in {type(whole).__name__} already(.|\n)*{RIGHT}"
    for put in (helpers.attach, lambda m: drlora_torch.load(m, tmp_path)):
        with pytest.raises(drlora_torch.AttachError, match=message):
            put(fresh)
    assert not [name for name, _ in fresh.named_parameters() if "drlora" in name]


def test_the_model_inside_an_engine_of_deepspeed_is_refused(library: Library) -> None:
    hooks = library("deepspeed.runtime.engine", "def prologue(module, args): ...")
    model = models.build()
    handle = model.register_forward_pre_hook(hooks.prologue)
    with pytest.raises(drlora_torch.AttachError, match=rf"before attach(.|\n)*{RIGHT}"):
        helpers.attach(model)
    handle.remove()
    assert helpers.attach(model).layers
