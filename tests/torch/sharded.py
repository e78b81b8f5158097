"""What two processes do with adapters that they hold together, for test_sharded.py."""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

pytest.importorskip("peft")
pytest.importorskip("transformers.distributed")

from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import drlora_torch
from drlora_torch.errors import DRLoRAError
from drlora_torch.lora import parts
from drlora_torch.step import sharded
from tests.torch import helpers, models
from tests.torch.helpers import Spy
from tests.torch.waiting import arrive_late

Said = dict[str, Any]


def shard(model: Any, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def build() -> Any:
    model = models.build(dtype=torch.float64)
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    return model


def attached(**options: Any) -> tuple[Any, drlora_torch.Adapter]:
    model = build()
    return model, helpers.attach(model, **options)


def rows() -> slice:
    first = 2 * torch.distributed.get_rank()
    return slice(first, first + 2)


def backward(model: Any, seed: int, chosen: slice | None = None) -> None:
    ids = models.tokens(4, 7, seed)[chosen or rows()]
    model(input_ids=ids, labels=ids).loss.backward()


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: range, chosen: slice | None = None
) -> None:
    for seed in steps:
        backward(model, seed, chosen)
        optimizer.step()
        optimizer.zero_grad()


def what_is_said(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except DRLoRAError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(folder: Path, said: Said) -> None:
    """What would train LoRA apart, or not at all."""
    model, adapter = attached()
    shard(model, ignored_params=set(adapter.parameters()))
    said["left out"] = what_is_said(lambda: train(model, helpers.adamw(adapter), range(1)))
    model, adapter = attached()
    shard(model, ignored_params=set(adapter.parameters()[:2]))
    said["two left out"] = what_is_said(lambda: train(model, helpers.adamw(adapter), range(1)))
    model, adapter = attached()
    lora = {id(parameter) for parameter in adapter.parameters()}
    shard(model, shard_placement_fn=lambda p: Shard(1) if id(p) in lora else None)
    said["columns"] = what_is_said(lambda: train(model, helpers.adamw(adapter), range(1)))
    model, adapter = attached(router="trainable")
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=init_device_mesh("cpu", (2,)))
    said["routers left out"] = what_is_said(lambda: train(model, helpers.adamw(adapter), range(1)))
    alone = [torch.distributed.new_group([each]) for each in range(2)][torch.distributed.get_rank()]
    model, adapter = attached(process_group=alone)
    shard(model)
    said["small group"] = what_is_said(lambda: train(model, helpers.adamw(adapter), range(1)))
    model, adapter = attached()
    optimizer = helpers.adamw(adapter)
    shard(model)
    said["early optimizer"] = what_is_said(lambda: train(model, optimizer, range(1)))
    model, adapter = attached()
    shard(model)
    for action in ("merge", "merge_and_save", "export_peft", "import_peft"):
        method = getattr(adapter, action)
        arguments = [] if action == "merge" else [folder / action]
        said[action] = what_is_said(lambda m=method, a=arguments: m(*a))  # type: ignore[misc]
    with torch.no_grad():
        model(input_ids=models.tokens(2, 7, 0))  # leaves gathered copies in the root
    said["merge after a forward"] = what_is_said(adapter.merge)
    said["is sharded"] = adapter.is_sharded
    said["trained after"] = what_is_said(lambda: train(model, helpers.adamw(adapter), range(2)))
    foreign, mesh = build(), init_device_mesh("cpu", (2,))
    for layer in foreign.model.layers:
        held = distribute_tensor(layer.mlp.experts.gate_up_proj.detach(), mesh, [Shard(0)])
        layer.mlp.experts.gate_up_proj = torch.nn.Parameter(held)
    said["foreign"] = what_is_said(lambda: helpers.attach(foreign))
    staged = load(folder, pp_size=2)
    said["pipeline"] = what_is_said(lambda: helpers.attach(staged))


def load(folder: Path, **sizes: int) -> Any:
    config = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float64,
        experts_implementation="eager",
        distributed_config=config,
    )
    return model.train()


def traps(folder: Path, said: Said) -> None:
    """Gathered copies, dropped batches, trial steps, mixed dtypes."""
    for in_place in (False, True):
        model, adapter = attached()
        shard(model)
        optimizer, spy = helpers.adamw(adapter), Spy(adapter)
        backward(model, 0)
        optimizer.zero_grad(set_to_none=not in_place)
        train(model, optimizer, range(1, 3))
        said[f"tokens of a dropped batch, {in_place}"] = [
            [tokens for _, _, tokens in step.values()] for step in spy.samples
        ]
    said["trial steps"] = [count_trial_steps(wrapped=True), count_trial_steps(wrapped=False)]

    model, adapter = attached(router="trainable")
    shard(model, reshard_after_forward=False)
    optimizer = helpers.adamw(adapter)
    train(model, optimizer, range(5))
    with torch.no_grad():
        trained = model(input_ids=models.tokens(4, 7, 0)).logits.clone()
        adapter.save_pretrained(folder / "gathered")
        with adapter.disabled():
            said["base"] = model(input_ids=models.tokens(4, 7, 0)).logits.clone()
        again = model(input_ids=models.tokens(4, 7, 0)).logits.clone()
    said["disabled and back"] = torch.equal(trained, again)
    said["logits"] = trained
    train(model, optimizer, range(5, 7))
    with torch.no_grad():
        model(input_ids=models.tokens(4, 7, 0))
    said["held together"] = adapter.is_sharded
    with torch.no_grad():
        model(input_ids=models.tokens(4, 7, 0))
    adapter.restore(folder / "gathered")
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # what was written to copies is gone now
    with torch.no_grad():
        back = model(input_ids=models.tokens(4, 7, 0)).logits
    said["restored"] = torch.equal(trained, back)

    for name, policy in {
        "bfloat16 base": {},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    }.items():
        model = models.build(dtype=torch.bfloat16 if not policy else torch.float32)
        adapter = helpers.attach(model)
        shard(model, **policy)
        train(model, helpers.adamw(adapter), range(5))
        said[name] = (
            {p.dtype for p in adapter.parameters()},
            len(adapter.events),
            [parts.whole(parameter) for parameter in adapter.parameters()],
        )


def several(folder: Path, said: Said) -> None:
    """A second adapter comes to a sharded model, and each is active in turn."""
    model, first = attached(adapter_name="first")
    shard(model)
    optimizer, ids = helpers.adamw(first), models.tokens(4, 7, 0)
    train(model, optimizer, range(5))
    with torch.no_grad():
        alone = model(input_ids=ids).logits.clone()
    second = helpers.attach(model, adapter_name="second")
    train(model, helpers.adamw(second), range(5))
    first.activate()
    with torch.no_grad():
        said["first again"] = torch.equal(alone, model(input_ids=ids).logits)
    second.activate()
    second.detach()
    with torch.no_grad():
        said["first alone"] = torch.equal(alone, model(input_ids=ids).logits)
    train(model, optimizer, range(5, 7))
    said["steps of both"] = first.engine.step_count, second.engine.step_count


def count_trial_steps(*, wrapped: bool) -> int:
    """Steps that the engine sees when the state of a fresh optimizer is asked for."""
    model, adapter = attached(router="after_warmup")
    if wrapped:
        shard(model)
    get_optimizer_state_dict(model, helpers.adamw(adapter))
    return adapter.engine.step_count


def all_tokens_elsewhere(folder: Path, said: Said) -> None:
    """Every token of both processes goes to experts of one of them."""
    for name, sizes in {"ep": {"fsdp_size": 2, "ep_size": 2}, "tp": {"tp_size": 2}}.items():
        model = load(folder, **sizes)
        with torch.no_grad():
            for layer in model.model.layers:
                parts.local(layer.mlp.gate.weight).zero_()  # ties: the same experts for all tokens
        adapter = helpers.attach(model)
        spy = Spy(adapter)
        same = slice(0, 2) if name == "tp" else None
        train(model, helpers.adamw(adapter), range(5), same)
        said[f"one side, {name}"] = [
            {layer: (phi, s) for layer, (phi, s, _) in step.items()} for step in spy.samples
        ]


def saves(folder: Path, said: Said) -> None:
    """Saves that cannot be complete leave what was there."""
    model, adapter = attached()
    shard(model)
    train(model, helpers.adamw(adapter), range(7))  # then all slots have owners
    (folder / "a file").write_text("in the way")
    said["no folder"] = what_is_said(lambda: adapter.save_pretrained(folder / "a file"))
    full = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if torch.distributed.get_rank() == 0:  # what Accelerate gathers for the first process
        model.save_pretrained(folder / "gathered by others", state_dict=full)
    beside(folder)
    adapter.save_pretrained(folder / "good")
    before = (folder / "good" / "drlora_adapter.safetensors").read_bytes()
    if torch.distributed.get_rank() == 1:
        parts.local(adapter.parameters()[0])[0, 0] = torch.nan
    said["not finite"] = what_is_said(lambda: adapter.save_pretrained(folder / "good"))
    table = next(iter(adapter.layers.values())).lora.table
    owner, position = table.owner.copy(), table.position.copy()
    if torch.distributed.get_rank() == 1:
        table.load(owner[::-1], position[::-1])
    said["other tables"] = what_is_said(lambda: adapter.save_pretrained(folder / "good"))
    said["good"] = (folder / "good" / "drlora_adapter.safetensors").read_bytes() == before
    adapter.restore(folder / "good")  # the way back
    adapter.save_pretrained(folder / "again")
    said["again"] = (folder / "again" / "drlora_adapter.safetensors").read_bytes() == before
    torch.distributed.barrier()
    sharded.PATIENCE = datetime.timedelta(seconds=2)
    if torch.distributed.get_rank() == 0:
        said["alone"] = what_is_said(lambda: adapter.save_pretrained(folder / "alone"))
    else:
        try:
            model(input_ids=models.tokens(2, 7, 0))
        except RuntimeError as error:  # the other process is gone
            said["alone"] = str(error)


def beside(folder: Path) -> None:
    """Saves of a PeftModel from a gathered state, and of a model that Transformers spreads."""
    model = build()
    outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapter = helpers.attach(outer)
    shard(model)
    fully_shard(outer, mesh=init_device_mesh("cpu", (2,)))
    train(outer, torch.optim.AdamW([p for p in outer.parameters() if p.requires_grad]), range(2))
    full = get_model_state_dict(
        outer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if torch.distributed.get_rank() == 0:
        outer.save_pretrained(folder / "in peft", state_dict=full)
    assert adapter.engine.step_count == 2
    model = load(folder, fsdp_size=2)
    adapter = helpers.attach(model)
    train(model, helpers.adamw(adapter), range(2))
    model.save_pretrained(folder / "by transformers")
    train(model, helpers.adamw(adapter), range(2))
    assert adapter.engine.step_count == 4


def late(folder: Path, said: Said) -> None:
    """Statistics that arrive late, of DTensors and of whole parameters."""
    for name in ("sharded", "parallel"):
        results = []
        for waits in (True, False):
            with pytest.MonkeyPatch.context() as monkeypatch:
                if not waits:
                    arrive_late(monkeypatch)
                model, adapter = attached(router="after_warmup")
                wrapped = shard(model) if name == "sharded" else DistributedDataParallel(model)
                optimizer = helpers.adamw(adapter)
                train(wrapped, optimizer, range(5))
                backward(wrapped, 50)
                optimizer.zero_grad(set_to_none=False)  # a dropped batch
                train(wrapped, optimizer, range(5, 8))
                assert adapter.engine.pending != waits
                state = adapter.engine.state_dict()["layers"]
            whole = [parts.whole(parameter) for parameter in adapter.parameters()]
            events = [(event.step, event.ranks) for event in adapter.events]
            results.append((whole, repr(state), repr(events)))
        (whole, *decided), (others, *decided_late) = results
        same = all(map(torch.equal, whole, others))
        said[f"late, {name}"] = (same, decided == decided_late, len(adapter.events))


SIGNALS: tuple[dict[str, Any], ...] = tuple(
    {name: value, "auto_step": auto_step}
    for name, value in (
        ("importance", "sensitivity_per_token"),
        ("importance", "fisher"),
        ("importance", "update_norm"),
        ("routing", "margin"),
        ("routing", "count"),
    )
    for auto_step in (True, False)
)


def measure(model: Any, adapter: drlora_torch.Adapter, chosen: slice | None) -> list[Any]:
    """What the engine is given in two steps."""
    spy, optimizer = Spy(adapter), helpers.adamw(adapter)
    for seed in range(2):
        backward(model, seed, chosen)
        optimizer.step()
        if not adapter.options.auto_step:
            adapter.step()
        optimizer.zero_grad()
    return [{name: (phi, s) for name, (phi, s, _) in step.items()} for step in spy.samples]


def profile(model: Any, chosen: slice) -> list[Any]:
    ids = [models.tokens(4, 7, seed)[chosen] for seed in range(2)]
    recording = drlora_torch.profile(model, [{"input_ids": each, "labels": each} for each in ids])
    return [recording.routing, recording.importance, recording.tokens]


def signals(folder: Path, said: Said) -> None:
    """Signals of rows that processes hold together, and of whole ones; a profile likewise."""
    said["profile"] = profile(shard(build()), rows())
    for name in ("sharded", "parallel", "ep"):
        said[f"signals, {name}"] = []
        for options in SIGNALS:
            if name == "ep":
                model = load(folder, fsdp_size=2, ep_size=2)
                adapter = helpers.attach(model, **options)
            else:
                model, adapter = attached(**options)
                model = shard(model) if name == "sharded" else DistributedDataParallel(model)
            said[f"signals, {name}"].append(measure(model, adapter, rows()))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    said: Said = {}
    for scenario in (refusals, traps, several, late, signals, all_tokens_elsewhere, saves):
        scenario(Path(folder), said)
    torch.save(said, f"{folder}/{rank}.pt")
    os._exit(0)
