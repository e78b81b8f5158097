"""Models of the full architecture of real ones, with random weights.

A model is built without weights, and then filled. The weights of an expert are drawn and quantized
one expert at a time, so that the experts are never whole in bfloat16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from drlora_torch import Experts4bitConfig
from drlora_torch.models.quantization.in_memory import announce
from drlora_torch.models.quantization.places import Place, find_places, start_packed
from drlora_torch.quantized import holders

STD = 0.02
DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The architecture of a model, and how it is trained."""

    kind: str
    """Family, as Transformers names it."""
    fields: Mapping[str, Any]
    quantization: str
    """``none``, ``nf4`` or ``fp4``."""
    r_init: int
    r_target: int
    r_max: int

    def config(self, layers: int | None = None) -> Any:
        """The configuration of the model, or of its first layers alone."""
        fields = dict(self.fields, use_cache=False)
        if layers is not None:
            fields["num_hidden_layers"] = layers
        return AutoConfig.for_model(self.kind, **fields)


PRESETS = {
    "qwen3-30b-a3b": Preset(
        kind="qwen3_moe",
        fields={
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
            "vocab_size": 151936,
        },
        quantization="nf4",
        r_init=2,
        r_target=4,
        r_max=8,
    ),
    "olmoe-1b-7b": Preset(
        kind="olmoe",
        fields={
            "num_hidden_layers": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
        },
        quantization="none",
        r_init=8,
        r_target=16,
        r_max=64,
    ),
}


def build(config: Any, quantization: str) -> Any:
    """Build a model with random weights, N(0, 0.02); gains are 1."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    places = find_places(model)
    with _workers() as pool:
        for number, place in enumerate(places):
            _fill(place, quantization, 1000 * number, pool)
    if quantization != "none":
        start_packed(places)
        announce(model, Experts4bitConfig(quant_type=quantization), places)
    _fill_rest(model)
    return model.requires_grad_(False)


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core, in each of which torch uses one: the products here are too small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _fill(place: Place, quantization: str, seed: int, pool: ThreadPoolExecutor) -> None:
    """Give a projection the weights of all of its experts."""
    count, *shape = place.weight.shape
    if quantization == "none":
        weight = torch.empty(count, *shape, dtype=DTYPE)
        list(pool.map(lambda expert: _draw(weight[expert], seed + expert), range(count)))
        setattr(place.holder, place.name, nn.Parameter(weight, requires_grad=False))
        return
    form = place.form(quantization, True)
    packed = form.empty("cpu")

    def pack(expert: int) -> None:
        values = _draw(torch.empty(*shape, dtype=DTYPE), seed + expert)
        form.pack_expert(packed, expert, values)

    list(pool.map(pack, range(count)))
    holders.declare(place.holder, place.name, form, packed)


def _draw(values: Tensor, seed: int) -> Tensor:
    return values.normal_(0.0, STD, generator=torch.Generator().manual_seed(seed))


def _fill_rest(model: Any) -> None:
    """Give weights to everything that is not an expert, and their values to buffers."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                setattr(module, name, type(child)(model.config))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.ones(parameter.shape, dtype=DTYPE)
            if parameter.dim() > 1:
                _draw(values, zlib.crc32(name.encode()))
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
