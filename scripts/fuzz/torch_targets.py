"""Readers of drlora_torch: adapters of ours and of PEFT, and recipes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.plan import make_plan
from drlora_torch.finetune.recipe import absolute, combine, to_yaml
from drlora_torch.inspection import inspect
from drlora_torch.models.shapes import build_skeleton, read_shape
from drlora_torch.storage.travel import LENGTH
from scripts.fuzz.targets import ACCEPTED, Target


@functools.cache
def base() -> OlmoeForCausalLM:
    """A tiny model; every reader leaves it as it was."""
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OlmoeForCausalLM(OlmoeConfig(**sizes)).eval()


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base().state_dict().items()}


def attach() -> drlora_torch.Adapter:
    weights()
    settings = AllocatorConfig(
        r_init=2, r_target=4, r_max=8, warmup_steps=0, growth_interval=2, growth_end=4
    )
    return drlora_torch.attach(base(), AllocatorEngine(settings), router="trainable")


def train(adapter: drlora_torch.Adapter) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        tokens = torch.arange(1, 13).reshape(1, 12)
        base().train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base().eval()


def check_whole() -> None:
    now = base().state_dict()
    assert now.keys() == weights().keys(), "the model is not as it was"
    assert all(torch.equal(now[name], value) for name, value in weights().items())


def write_adapter(folder: Path) -> None:
    adapter = attach()
    train(adapter)
    adapter.save_pretrained(folder)
    adapter.detach()


def check_outputs(adapter: drlora_torch.Adapter) -> None:
    """What was accepted has to compute numbers."""
    with torch.no_grad():
        logits = base()(input_ids=torch.arange(1, 9)[None]).logits
    assert torch.isfinite(logits).all(), "outputs that are not finite"
    for name in adapter.engine.layer_names:
        assert torch.isfinite(torch.as_tensor(adapter.engine.saliency(name))).all()


def read_adapter(folder: Path) -> None:
    try:
        adapter = drlora_torch.load(base(), folder)
        try:
            check_outputs(adapter)
        finally:
            adapter.detach()
    finally:
        check_whole()


def write_peft(folder: Path) -> None:
    adapter = attach()
    train(adapter)
    adapter.export_peft(folder)
    adapter.detach()


def read_peft(folder: Path) -> None:
    adapter = attach()
    try:
        adapter.import_peft(folder)
        check_outputs(adapter)
    finally:
        adapter.detach()
        check_whole()


def write_state_dict(folder: Path) -> None:
    """The adapter in the model's state dict: its rows, and the file in its extra state."""
    adapter = attach()
    train(adapter)
    state = dict(base().state_dict())
    own = {key: value for key, value in state.items() if "drlora" in key}
    extra = next(key for key in own if key.endswith("_extra_state"))
    content = own.pop(extra).numpy().tobytes()
    length = int.from_bytes(content[:LENGTH], "little")
    (folder / "extra.safetensors").write_bytes(content[LENGTH : LENGTH + length])
    (folder / "extra.key").write_text(extra)
    save_file({key: value.contiguous() for key, value in own.items()}, folder / "rows.safetensors")
    adapter.detach()


def read_state_dict(folder: Path) -> None:
    content = (folder / "extra.safetensors").read_bytes()
    content = len(content).to_bytes(LENGTH, "little") + content
    try:
        rows = load_file(folder / "rows.safetensors")
    except Exception:  # not read by drlora
        return
    rows[(folder / "extra.key").read_text()] = torch.frombuffer(
        bytearray(content), dtype=torch.uint8
    )
    adapter = attach()
    before = adapter_values(adapter)
    try:
        base().load_state_dict({**base().state_dict(), **rows})
        check_outputs(adapter)
    except ACCEPTED:
        assert adapter_values(adapter) == before, "the adapter is not as it was"
        raise
    except RuntimeError as error:  # torch's own, for keys and shapes that do not fit
        if "Error(s) in loading state_dict" not in str(error):
            raise
    finally:
        adapter.detach()
        check_whole()


def adapter_values(adapter: drlora_torch.Adapter) -> list[Any]:
    own = [value.tolist() for value in adapter.lora_parameters()]
    return [own, {name: ranks.tolist() for name, ranks in adapter.ranks().items()}]


def write_family(folder: Path) -> None:
    base().config.save_pretrained(folder)


def read_family(folder: Path) -> None:
    """The model of a family, built by Transformers without weights."""
    make_plan(read_shape(str(folder)), AllocatorConfig.for_training(200))
    inspect(build_skeleton(str(folder)), 8)


def write_recipe(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model: m\ndata: d.jsonl\nsteps: 40\nlearning_rate: 0.001\nr_target: 4\nr_max: 12\n"
        "timetable: early\nseed: 0\nmax_length: 64\nquantization: none\n"
    )


def read_recipe(folder: Path) -> None:
    recipe = absolute(combine({}, folder / "run.yaml"))
    recipe.options.allocator_config()
    (folder / "again.yaml").write_text(to_yaml(recipe))
    combine({}, folder / "again.yaml")


TARGETS = {
    "adapter": Target(write_adapter, read_adapter, ("drlora_adapter.safetensors",), share=0.2),
    "peft": Target(
        write_peft, read_peft, ("adapter_config.json", "adapter_model.safetensors"), share=0.2
    ),
    "state-dict": Target(
        write_state_dict, read_state_dict, ("extra.safetensors", "rows.safetensors"), share=0.2
    ),
    "family": Target(write_family, read_family, ("config.json",), share=0.1),
    "recipe": Target(write_recipe, read_recipe, ("run.yaml",), share=0.4),
}
