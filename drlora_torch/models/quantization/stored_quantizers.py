"""Load checkpoints whose experts are packed already, FP8 or MXFP4, and keep them as they are.

Transformers unpacks the whole model where its kernels cannot run (any CPU, older GPUs), or hands
MXFP4 to kernels that keep a layout of their own. Ours need neither: the experts stay as the
checkpoint has them, and FP8 Linears of the rest are unpacked while loading.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, QuantizationConfigMixin

from drlora_torch.errors import FOREIGN_CODE, ModelError, needs_foreign_code
from drlora_torch.models.quantization.loading import (
    Trainable,
    check_loaded,
    check_version,
    refuse_parts,
)

MXFP4_METHOD, FP8_METHOD = "drlora_experts_mxfp4", "drlora_experts_fp8"
METHODS = {"mxfp4": MXFP4_METHOD, "fp8": FP8_METHOD}


def packed_config(name: str | os.PathLike[str], **options: Any) -> Any:
    """Read the configuration of an FP8 or MXFP4 checkpoint, for loading its experts as they are.

    Args:
        name: a folder, or an id on the Hugging Face Hub, as ``from_pretrained`` takes it.
        options: further options of ``AutoConfig.from_pretrained``; ``trust_remote_code`` is False
            if it is not given.

    Returns:
        A configuration to pass on, with the same name:
        ``AutoModelForCausalLM.from_pretrained(name, config=packed_config(name))``.

    Raises:
        ModelError: the checkpoint is not quantized, or in another way, or needs code of its own.
        OSError: there is no such file or hub id.
    """
    from transformers import AutoConfig

    name = os.fspath(name)
    try:
        config = AutoConfig.from_pretrained(name, **{"trust_remote_code": False, **options})
    except ValueError as error:
        if not needs_foreign_code(error):
            raise
        raise ModelError(f"{name!r} cannot be read: {FOREIGN_CODE}") from error
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        raise ModelError(
            f"{name!r} is not quantized; to quantize its experts while loading, use "
            "quantization_config=drlora_torch.Experts4bitConfig()"
        )
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    if method not in METHODS:
        raise ModelError(
            f"{name!r} is quantized with {method!r}; its experts can be kept as they "
            f"are for {' and '.join(METHODS)}"
        )
    config.quantization_config = {"quant_method": METHODS[method], "stored": stored}
    return config


class _StoredConfig(QuantizationConfigMixin):
    """What the checkpoint says of itself, under a name that finds our quantizer."""

    def __init__(self, quant_method: str, stored: dict[str, Any]) -> None:
        self.quant_method = quant_method
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        """Return what the checkpoint says, so that a saved one is as the one that was read."""
        return copy.deepcopy(self.stored)


@register_quantization_config(MXFP4_METHOD)
class MXFP4Config(_StoredConfig):
    """An MXFP4 checkpoint whose blocks and scales stay as they are."""


@register_quantization_config(FP8_METHOD)
class FP8Config(_StoredConfig):
    """An FP8 checkpoint whose experts stay as they are."""


@register_quantizer(MXFP4_METHOD)
class MXFP4Quantizer(Trainable, HfQuantizer):
    """Reads blocks and scales into the model's own experts."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """No kernel of Transformers is needed."""
        check_version()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from drlora_torch.models.quantization.places import find_places, start_packed
        from drlora_torch.quantized import holders

        refuse_parts(model)
        self.places = find_places(model)
        for place in self.places:
            stored = place.convention.stored(place.experts, place.projection)
            count, inner, outer = stored.shape
            if inner % holders.FP4_TILE[1]:
                raise ModelError(
                    f"{place.projection} of {place.layer!r} has {inner} input features, which "
                    "blocks of 32 values cannot hold: this is no MXFP4 checkpoint"
                )
            form = holders.MXFP4((count, outer, inner))
            holders.declare(place.holder, place.name, form, form.empty("meta"))
        start_packed(self.places)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        names = {id(module): name for name, module in model.named_modules()}
        for place in self.places:
            check_loaded(f"{names[id(place.holder)]}.{place.name}", place)
        return model


@register_quantizer(FP8_METHOD)
class FP8Quantizer(Trainable, FineGrainedFP8HfQuantizer):
    """Reads FP8 experts as they are, and unpacks the Linears of the rest."""

    def __init__(self, quantization_config: FP8Config, **options: Any) -> None:
        known = dict(quantization_config.stored)
        known.pop("quant_method")
        own = FineGrainedFP8Config(**known)
        own.dequantize = True  # which holds for all but the experts
        super().__init__(own, **options)
        self.stored_config = quantization_config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """No kernel of Transformers is needed."""
        check_version()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

        from drlora_torch.models.quantization.places import find_places, start_packed

        refuse_parts(model)
        self._normalize_modules_to_not_convert(model)
        linears = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
        config = copy.copy(self.quantization_config)
        config.dequantize = False
        given = config.modules_to_not_convert or []
        replace_with_fp8_linear(model, [*given, *linears], config, pre_quantized=True)
        self.places = [p for p in find_places(model) if "FP8" in type(p.holder).__name__]
        start_packed(self.places)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Keep what the base class removes from a model that it has unpacked as a whole."""
        model.config.quantization_config = self.stored_config
        for place in self.places:  # fully_shard wants what learns in one dtype
            place.holder.requires_grad_(False)
        return self._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        """Its Linears are unpacked, so the model is not what its configuration says."""
        return False
