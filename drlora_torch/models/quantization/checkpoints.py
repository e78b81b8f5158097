"""Write a checkpoint of Transformers piece by piece, and read it back."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from drlora_torch.errors import ModelError
from drlora_torch.models.quantization.loading import Trainable
from drlora_torch.models.quantization.quantizer import ExpertsQuantizer
from drlora_torch.quantized.scaled import FP8, ScaledWeight

PROBE = 16
"""Tokens by which two models are compared."""
ON_CPU = {"eager", "batched_mm", "grouped_mm"}
"""Ways in which Transformers computes experts on a CPU."""


def write(
    model: Any,
    folder: Path,
    state: Mapping[str, Any],
    pieces: Iterable[dict[str, Tensor]],
    *,
    packed: bool,
) -> None:
    """Write a model whose weights come in pieces, under the names of the original checkpoint.

    Args:
        model: gives the configuration and the names.
        folder: an empty one.
        state: weights that are in memory, unpacked unless ``packed``.
        pieces: the others, by their names in the model; each is written before the next is made.
        packed: leave the configuration quantized, as it is.
    """
    rest = dict(state)
    for key in model._keys_to_ignore_on_save or ():
        rest.pop(key, None)
    rest = remove_tied_weights_from_state_dict(rest, model)
    shards: list[dict[str, int]] = []
    with original_names(model, packed):
        for piece in _chain(rest, pieces):
            tensors = {k: v.contiguous() for k, v in revert_weight_conversion(model, piece).items()}
            save_file(tensors, folder / _name(len(shards), None), metadata={"format": "pt"})
            shards.append({name: tensor.nbytes for name, tensor in tensors.items()})
            piece.clear()
            del tensors
    _write_index(folder, shards)
    _write_configuration(model, folder, packed)


def _chain(
    rest: dict[str, Tensor], pieces: Iterable[dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    yield rest
    yield from pieces


def _name(shard: int, total: int | None) -> str:
    return f"model-{shard + 1:05d}-of-{total or 0:05d}.safetensors"


def _write_index(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards their final names, and tell which weight is in which."""
    places: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = _name(number, len(shards))
        os.replace(folder / _name(number, None), folder / name)
        places |= dict.fromkeys(shard, name)
    size = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_configuration(model: Any, folder: Path, packed: bool) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(float_dtype(model)).removeprefix("torch.")
    if not packed and hasattr(config, "quantization_config"):
        del config.quantization_config
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@contextlib.contextmanager
def original_names(model: Any, packed: bool = False) -> Iterator[None]:
    """Inside, weights are saved under the names of a checkpoint that is not quantized, or is.

    What a quantizer did while loading must not be undone to weights that are unpacked: Transformers
    5.23 writes a model that it has unpacked from MXFP4 under names which it cannot read.
    """
    before = getattr(model, "_weight_conversions", None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not packed and before is not None:
        loaded = type(quantizer) is ExpertsQuantizer and not quantizer.pre_quantized
        kept = quantizer.conversions if loaded else before
        # None stands for those of the family: a packed checkpoint had no use for them
        by_quantizer = (isinstance(quantizer, Trainable) and not loaded) or any(
            hasattr(op, "hf_quantizer") for each in kept for op in getattr(each, "operations", ())
        )
        model._weight_conversions = None if by_quantizer else kept
    try:
        yield
    finally:
        if before is not None:
            model._weight_conversions = before


def unpack_linears(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Unpack the Linears that bitsandbytes has packed, and those in FP8."""
    plain, dtype = dict(state), float_dtype(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (found := _unpacked(module, dtype)) is not None:
            beside = f"{name}.weight"
            plain = {k: v for k, v in plain.items() if not _is_beside(k, beside)}
            plain[beside] = found
    return plain


def _is_beside(name: str, weight: str) -> bool:
    """True for what is kept beside a packed weight."""
    return name.startswith((f"{weight}.", f"{weight}_scale"))


def _unpacked(linear: Any, dtype: torch.dtype) -> Tensor | None:
    """The weight of a packed Linear, [O, I]; None for one that is not packed."""
    if getattr(linear.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return weight
    scales = getattr(linear, "weight_scale_inv", None)
    if linear.weight.dtype is not FP8 or scales is None:
        _check_plain(linear)
        return None
    rows, columns = linear.weight.shape
    tile = tuple(linear.block_size or (rows, columns))
    packed = ScaledWeight((linear.weight[None], scales.reshape(1, *_grid(scales))), "fp8", tile)
    return packed.matrix(0, dtype).T


def _check_plain(linear: Any) -> None:
    weight = linear.weight
    plain = weight.is_floating_point() and weight.itemsize > 1
    if not plain or hasattr(weight, "__tensor_flatten__"):
        kind = f"{type(linear).__name__} ({type(weight).__name__}, {weight.dtype})"
        raise ModelError(
            f"the rest of the model has Linears that cannot be unpacked, {kind}; merge into a "
            "model that was loaded without them"
        )


def _grid(scales: Tensor) -> tuple[int, int]:
    return (1, 1) if scales.dim() == 0 else (scales.shape[0], scales.shape[1])


def float_dtype(model: nn.Module) -> torch.dtype:
    """Data type of the weights that are not packed."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    return next(floats, torch.bfloat16)


def reload(model: Any, folder: Path) -> Any:
    """Load what was written, on the CPU; of a quantized model, bitsandbytes would choose a GPU.

    Its experts are computed as those of the model are, where a CPU can do that.
    """
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    options: dict[str, Any] = {"device_map": "cpu"} if quantized else {}
    options |= {"dtype": float_dtype(model), "trust_remote_code": False}
    written = type(model).from_pretrained(folder, **options).eval()
    if hasattr(model, "get_experts_implementation"):
        chosen = model.get_experts_implementation()
        written.set_experts_implementation({k: v for k, v in chosen.items() if v in ON_CPU})
    return written


def can_reload(model: Any) -> bool:
    """True for a model that reads token ids, and that its class can load."""
    if not hasattr(type(model), "from_pretrained"):
        return False
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return False  # a tower for images or speech
    return model.main_input_name == "input_ids" and isinstance(embeddings, nn.Embedding)


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Logits (or last hidden states) of a few random tokens, float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PROBE), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    training = {module: module.training for module in model.modules()}
    try:
        found: Tensor = model.eval()(**inputs)[0]
    finally:
        for module, value in training.items():
            module.training = value
    return found.float().cpu()
