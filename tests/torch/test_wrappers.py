"""Wrapped models: compiled ones are looked through, those of several processes refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

import drlora_torch
from drlora_torch import AttachError
from drlora_torch.models import sharding
from tests.marks import slow_and_thinned
from tests.torch import helpers, models

# Dynamo's own, when it looks at a tensor between two graphs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
LAYERS = [f"model.layers.{i}.mlp.experts" for i in range(2)]
STEPS = 5


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def around(kind: type[nn.Module], model: Any) -> Any:
    """A wrapper as its library would make it, without several processes or GPUs."""
    wrapper = kind.__new__(kind)
    nn.Module.__init__(wrapper)
    inner = "_fsdp_wrapped_module" if kind is FullyShardedDataParallel else "module"
    wrapper._modules[inner] = model
    return wrapper


def train(model: Any, adapter: drlora_torch.Adapter) -> tuple[list[float], Any, Any]:
    spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter)
    losses = [helpers.step(model, optimizer, seed) for seed in range(STEPS)]
    tokens = [[sample[2] for sample in step.values()] for step in spy.samples]
    return losses, helpers.rank_history(adapter), tokens


# -- compiled ----------------------------------------------------------------------------------


def compile_then_attach(model: Any) -> tuple[Any, drlora_torch.Adapter]:
    whole = compiled(model)
    return whole, helpers.attach(whole)


def attach_then_compile(model: Any) -> tuple[Any, drlora_torch.Adapter]:
    adapter = helpers.attach(model)
    return compiled(model), adapter


def run_compiled_then_attach(model: Any) -> tuple[Any, drlora_torch.Adapter]:
    """The compiled code of before ``attach`` must not be used any more."""
    whole = compiled(model)
    whole(**helpers.batch(0)).loss.backward()
    model.zero_grad()
    return whole, helpers.attach(whole)


def compile_in_place(model: Any) -> tuple[Any, drlora_torch.Adapter]:
    model.compile(backend="eager")
    return model, helpers.attach(model)


def compile_layers_in_place(model: Any) -> tuple[Any, drlora_torch.Adapter]:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model, helpers.attach(model)


def attach_then_wrap_layers(model: Any) -> tuple[Any, drlora_torch.Adapter]:
    adapter = helpers.attach(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model, adapter


SLOW = [
    attach_then_compile,
    run_compiled_then_attach,
    compile_in_place,
    compile_layers_in_place,
    attach_then_wrap_layers,
]
ORDERS: list[Any] = [
    compile_then_attach,
    *slow_and_thinned((order,) for order in SLOW),
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_trains_as_an_eager_one(order: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    model, adapter = order(models.build(num_hidden_layers=1))
    assert list(adapter.layers) == LAYERS[:1]
    assert adapter.model is getattr(model, "_orig_mod", model)
    eager = models.build(num_hidden_layers=1)
    want = train(eager, helpers.attach(eager))
    assert want[1] != {name: [2] * 8 for name in LAYERS[:1]}
    assert train(model, adapter) == want
    ids, base = models.tokens(), models.build(num_hidden_layers=1)
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_compiled_model_is_looked_through_everywhere(tmp_path: Any) -> None:
    whole = compiled(models.build())
    assert [layer.name for layer in drlora_torch.discover(whole)] == LAYERS
    adapter = helpers.attach(whole)
    assert drlora_torch.adapters(whole) == {"default": adapter}
    assert drlora_torch.set_adapter(whole, "default") is adapter
    with pytest.raises(drlora_torch.AttachError, match="has an adapter already"):
        helpers.attach(whole)
    adapter.save_pretrained(tmp_path)
    again = compiled(models.build())
    assert list(drlora_torch.load(again, tmp_path).layers) == LAYERS


# -- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_a_wrapped_part_is_refused_before_it_renames_layers(
    wrap: Callable[[Any], Any], tmp_path: Any
) -> None:
    helpers.attach(models.build()).save_pretrained(tmp_path)
    model = models.build()
    model.model.layers[1] = wrap(model.model.layers[1])
    message = r"part 'model.layers.1' of the model is wrapped .*call attach first"
    for put in (helpers.attach, lambda m: drlora_torch.load(m, tmp_path)):
        with pytest.raises(drlora_torch.AttachError, match=message) as refusal:
            put(model)
    assert ("part.compile()" in str(refusal.value)) == (wrap is compiled)
    assert not [name for name, _ in model.named_parameters() if "drlora" in name]


def test_checkpoint_wrapper_after_attach_counts_once() -> None:
    eager = models.build()
    want = train(eager, helpers.attach(eager))
    model = models.build()
    adapter = helpers.attach(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    assert train(model, adapter) == want


# -- several processes -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DistributedDataParallel, FullyShardedDataParallel, DataParallel])
def test_wrappers_of_several_processes_are_refused(kind: type[nn.Module], tmp_path: Any) -> None:
    helpers.attach(models.build()).save_pretrained(tmp_path)
    model = models.build()
    message = rf"wrapped in {kind.__name__} already(.|\n)*wrong:(.|\n)*right(.|\n)*attach"
    for wrapped in (
        around(kind, model),
        around(kind, compiled(model)),
        compiled(around(kind, model)),
    ):
        for put in (helpers.attach, lambda m: drlora_torch.load(m, tmp_path)):
            with pytest.raises(drlora_torch.AttachError, match=message):
                put(wrapped)
    assert not [name for name, _ in model.named_parameters() if "drlora" in name]


@pytest.mark.parametrize("kind", [DistributedDataParallel, FullyShardedDataParallel, DataParallel])
def test_an_attached_adapter_is_found_through_them(kind: type[nn.Module]) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    wrapped = compiled(around(kind, model))
    assert drlora_torch.adapters(wrapped) == {"default": adapter}
    assert [layer.name for layer in drlora_torch.discover(wrapped)] == LAYERS


def test_copies_of_data_parallel_are_refused() -> None:
    """As it makes them on several GPUs."""
    model = models.build()
    helpers.attach(model)
    copy = model._replicate_for_data_parallel()
    with pytest.raises(drlora_torch.AttachError, match="one process for each GPU"):
        copy(**helpers.batch())
    model(**helpers.batch())


def test_a_module_of_the_user_around_the_model_is_none() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = models.build()

        def forward(self, **batch: Any) -> Any:
            return self.module(**batch)

    task = Task()
    adapter = helpers.attach(task)
    assert list(adapter.layers) == [f"module.{name}" for name in LAYERS]
    losses, _, _ = train(task, adapter)
    assert len(losses) == STEPS


def test_models_that_an_older_transformers_has_spread_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.build()
    model.config.distributed_config = SimpleNamespace(fsdp_size=1, ep_size=2, tp_size=2)
    monkeypatch.setattr(sharding, "version", lambda name: "5.22.1")
    with pytest.raises(AttachError, match=r"DistributedConfig\(tp_size=2, ep_size=2\).*5\.22\.1"):
        helpers.attach(model)
    assert not drlora_torch.adapters(model)
