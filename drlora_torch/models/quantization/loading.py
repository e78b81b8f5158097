"""What our quantizers of Transformers share: what they may be asked, and what they refuse.

It imports nothing of Transformers' quantizers: ours are registered in the middle of their import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import __version__

from drlora_torch.errors import ModelError

if TYPE_CHECKING:
    from drlora_torch.models.quantization.places import Place

OLDEST = (5, 23)


class Trainable:
    """What Transformers asks before it trains or saves a model; a part of our quantizers."""

    def is_serializable(self) -> bool:
        """Packed weights are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """An adapter trains on top of them."""
        return True


def check_version() -> None:
    """Refuse a Transformers whose quantizers are asked in another way."""
    if tuple(map(int, __version__.split(".")[:2])) < OLDEST:
        raise ModelError(
            f"packed experts are loaded with Transformers {'.'.join(map(str, OLDEST))} or newer, "
            f"and {__version__} is installed; drlora_torch.quantize_experts(model) packs those of "
            "a model that is in memory"
        )


def check_dtype(place: Place) -> None:
    """Refuse a weight that bitsandbytes does not take."""
    from drlora_torch.quantized.four_bit import DTYPES

    if place.weight.dtype not in DTYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ModelError(
            f"{place.projection} of layer {place.layer!r} is {place.weight.dtype}; only {known} "
            "can be quantized: load it with dtype=torch.bfloat16, or convert it first"
        )


def refuse_parts(model: Any) -> None:
    """Refuse a model of which every process would load a part."""
    if getattr(model, "_tp_size", None) or getattr(model.config, "distributed_config", None):
        raise ModelError(
            "packed experts cannot be loaded in parts (tp_plan, DistributedConfig); load the whole "
            "model in each process, and call fully_shard then"
        )


def check_loaded(name: str, place: Place) -> None:
    """Refuse experts of which something is missing in the checkpoint, or damaged."""
    from drlora_torch.quantized import holders

    path = name.removesuffix(place.name)
    for own, tensor in place.holder.named_parameters(recurse=False):
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ModelError(
                f"the checkpoint lacks {path + own}: these experts cannot be used; save or "
                "download it again"
            )
    form = holders.formats(place.holder)[place.name]
    for suffix, wanted in form.empty("meta").items():
        found = getattr(place.holder, place.name + suffix)
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise ModelError(
                f"the checkpoint is damaged: {name + suffix} is {found.dtype} {list(found.shape)} "
                f"and not {wanted.dtype} {list(wanted.shape)}; save or download it again"
            )
    if not form.is_sound(place.holder, place.name):
        raise ModelError(
            f"the checkpoint is damaged: {name} has scales that are not finite; save or download "
            "it again"
        )
