"""LoRA of dense Linears in several adapters of one model, and in wrapped models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import drlora_torch
from drlora_torch import AttachError
from drlora_torch.step import agreement
from tests.torch import helpers, models
from tests.torch.dense import RANK, adapted, linears, logits, train

# -- several adapters --------------------------------------------------------------------------


def test_each_of_several_adapters_has_its_own(tmp_path: Path) -> None:
    alone = {}
    for name, options in (("a", {"attention_rank": 2}), ("b", {"attention_rank": RANK}), ("c", {})):
        model = models.build()
        adapter = helpers.attach(model, config={"seed": len(alone)}, **options)
        alone[name] = options, train(model, adapter, range(5)), logits(model)
    model = models.build()
    adapters = {
        name: helpers.attach(model, adapter_name=name, config={"seed": i}, **options)
        for i, (name, (options, _, _)) in enumerate(alone.items())
    }
    for name, adapter in adapters.items():
        adapter.activate()
        assert train(model, adapter, range(5)) == alone[name][1]
    for name, adapter in adapters.items():
        adapter.activate()
        assert torch.equal(logits(model), alone[name][2])
    model.save_pretrained(tmp_path)
    assert drlora_torch.load(models.build(), tmp_path / "b").options.attention_rank == RANK
    for adapter in adapters.values():
        adapter.detach()
    assert not any("drlora" in name for name in model.state_dict())
    assert torch.equal(logits(model), logits(models.build()))


# -- wrappers ----------------------------------------------------------------------------------


def test_processes_that_differ_hear_of_linears_without_a_gradient() -> None:
    agreement.check(np.array([2.0, 4.0, 8.0]))  # 2 and 2
    with pytest.raises(AttachError, match=r"attention_targets=.*find_unused_parameters=True"):
        agreement.check(np.array([2.0, 4.0, 10.0]))  # 1 and 3


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_data_parallelism_after_attach_trains_the_same(tmp_path: Path) -> None:
    model, adapter = adapted("qwen2_moe")
    want, final = train(model, adapter, range(3)), logits(model)
    for way in ("DDP", "fully_shard"):
        model, adapter = adapted("qwen2_moe")
        called: Any = model
        if way == "DDP":
            called = DistributedDataParallel(model)
        else:
            for layer in (*model.model.layers, model):
                fully_shard(layer)
        optimizer = helpers.adamw(adapter)
        assert [helpers.step(called, optimizer, seed) for seed in range(3)] == want
        assert adapter.is_sharded == (way == "fully_shard")
        adapter.save_pretrained(tmp_path / way)
        fresh = models.build("qwen2_moe")
        drlora_torch.load(fresh, tmp_path / way)
        assert torch.equal(logits(fresh), final)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path / "all", state_dict=whole)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    drlora_torch.load(fresh, tmp_path / "all")
    assert torch.equal(logits(fresh), final)
    with pytest.raises(AttachError, match="processes hold those of this model together already"):
        helpers.attach(model, adapter_name="other", attention_rank=RANK)


@pytest.mark.usefixtures("one_process")
def test_linears_that_fully_shard_left_out_are_refused() -> None:
    model, adapter = adapted()
    ignored = set(next(iter(linears(adapter).values())).lora.parameters())
    fully_shard(model, ignored_params=ignored)
    optimizer = helpers.adamw(adapter)
    with pytest.raises(AttachError, match=r"left out 2 of 24 LoRA parameters \('dense/"):
        helpers.step(model, optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_trains_the_same() -> None:
    runs = []
    for compiled in (False, True):
        model, adapter = adapted()
        called: Any = model
        if compiled:
            called = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = helpers.adamw(adapter)
        runs.append([helpers.step(called, optimizer, seed) for seed in range(3)])
        with adapter.disabled():
            assert torch.equal(logits(called), logits(models.build()))
    assert runs[0] == runs[1]
