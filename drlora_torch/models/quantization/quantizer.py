"""Experts in 4 bits for ``from_pretrained`` and ``save_pretrained``: a quantizer of Transformers.

It is registered when Transformers imports its quantizers, so this module imports nothing of drlora
that would import a model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from drlora_torch.errors import ModelError
from drlora_torch.models.quantization.loading import (
    Trainable,
    check_dtype,
    check_loaded,
    check_version,
    refuse_parts,
)
from drlora_torch.models.quantization.packing import Pack, PackByExpert, as_it_was, merges

if TYPE_CHECKING:
    from drlora_torch.models.quantization.places import Place

METHOD = "drlora_experts_4bit"
TYPES = ("nf4", "fp4")
BLOCK = 64


@register_quantization_config(METHOD)
class Experts4bitConfig(QuantizationConfigMixin):
    """Load a model with the weights of its experts in 4 bits.

    Experts are packed as they are read, one weight of one layer at a time, by bitsandbytes in
    blocks of 64 values. ``model.save_pretrained`` writes the packed weights, and
    ``from_pretrained`` reads them back bit for bit (after ``import drlora_torch``; this config may
    be passed again).

    Args:
        quant_type: ``nf4``, for weights that are distributed normally, or ``fp4``.
        double_quant: quantize the scales too: 0.516 bytes a weight instead of 0.563.
        rest: how to load the Linears of the rest of the model; None leaves them as they are.
            Routers are always left so, and Linears whose input is no multiple of 64 features.

    Raises:
        ModelError: a value that is not accepted.

    Example:
        >>> config = Experts4bitConfig(rest=BitsAndBytesConfig(load_in_4bit=True))
        >>> config.quant_type
        'nf4'

        ::

            model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B",
                quantization_config=drlora_torch.Experts4bitConfig())
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        rest: BitsAndBytesConfig | dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise ModelError(
                f"Experts4bitConfig has no option {', '.join(sorted(unknown))}; "
                "it has quant_type, double_quant and rest"
            )
        if quant_type not in TYPES:
            raise ModelError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
        if not isinstance(double_quant, bool):
            raise ModelError(f"double_quant must be True or False, got {double_quant!r}")
        if isinstance(rest, dict):
            rest = BitsAndBytesConfig.from_dict(rest)
        if rest is not None and not (isinstance(rest, BitsAndBytesConfig) and rest.load_in_4bit):
            raise ModelError(f"rest must be a BitsAndBytesConfig(load_in_4bit=True), got {rest!r}")
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.double_quant = double_quant
        self.rest = rest

    def to_dict(self) -> dict[str, Any]:
        """Return what a ``config.json`` keeps."""
        values = dict(vars(self))
        return {**values, "rest": None if self.rest is None else self.rest.to_dict()}


@register_quantizer(METHOD)
class ExpertsQuantizer(Trainable, HfQuantizer):
    """Packs experts while a model is loaded; a second quantizer has the rest of it."""

    quantization_config: Experts4bitConfig

    def __init__(self, quantization_config: Experts4bitConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.places: dict[str, Place] = {}
        """The weights of the experts, by their names in the model."""
        self.conversions: list[Any] = []
        """Between the names of the model and those of the checkpoint before packing."""
        self.rest: HfQuantizer | None = None
        if quantization_config.rest is not None:
            from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

            pre_quantized = self.pre_quantized
            self.rest = Bnb4BitHfQuantizer(quantization_config.rest, pre_quantized=pre_quantized)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse before anything is loaded."""
        from drlora_torch.quantized.four_bit import load_bitsandbytes

        check_version()
        load_bitsandbytes()
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError(
                "experts in 4 bits cannot be offloaded to disk; leave it out of device_map"
            )
        if self.rest is not None:
            self.rest.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        """Let bitsandbytes choose a device, if it has a part of the model."""
        return device_map if self.rest is None else self.rest.update_device_map(device_map)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from drlora_torch.models.quantization.places import find_places, start_packed
        from drlora_torch.quantized import holders

        refuse_parts(model)
        config = self.quantization_config
        places = find_places(model)
        for place in places:
            check_dtype(place)
        names = {id(module): name for name, module in model.named_modules()}
        for place in places:
            form = place.form(config.quant_type, config.double_quant)
            self.places[f"{names[id(place.holder)]}.{place.name}"] = place
            holders.declare(place.holder, place.name, form, form.empty("meta"))
        start_packed(places)
        if self.rest is not None:
            if any(place.name == "weight" for place in places):  # bitsandbytes' names match it too
                raise ModelError(
                    f"the experts of {type(model).__name__} cannot be loaded beside Linears in "
                    "4 bits; use Experts4bitConfig(rest=None)"
                )
            if not self.pre_quantized:
                self._choose_linears(model, self.rest.quantization_config)
            self.rest._process_model_before_weight_loading(model, **kwargs)

    def _choose_linears(self, model: Any, config: Any) -> None:
        """Leave out routers, and Linears that bitsandbytes 0.50 multiplies wrongly on CPUs."""
        from drlora_torch.models.discovery import discover

        given = config.llm_int8_skip_modules
        skipped = get_keys_to_not_convert(model) if given is None else list(given)
        routers = [layer.router for layer in discover(model) if layer.router is not None]
        uneven = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.in_features % BLOCK
        ]
        config.llm_int8_skip_modules = sorted({*skipped, *routers, *uneven})

    def is_serializable(self) -> bool:
        """Packed experts are plain tensors; of Linears, those of bitsandbytes can be read again."""
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        return self.rest is None or isinstance(self.rest, Bnb4BitHfQuantizer)

    def adjust_max_memory(self, max_memory: Any) -> Any:
        """Leave room as the other quantizer wants it."""
        return max_memory if self.rest is None else self.rest.adjust_max_memory(max_memory)

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes of a value: packed experts are declared as they will be."""
        if self.rest is not None and self.rest.param_needs_quantization(model, param_name):
            return float(self.rest.param_element_size(model, param_name, param))
        return float(param.element_size())

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for the experts, and what the other quantizer wants."""
        rest = self.rest is not None and self.rest.param_needs_quantization(model, param_name)
        return param_name in self.places or rest

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that packs a weight as it is read."""
        return Pack(self)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Read packed experts under their own names: they are neither merged nor transposed."""
        if self.pre_quantized:
            weight_conversions = self._without_experts(weight_conversions)
        else:
            weight_conversions = [self._by_expert(each) for each in weight_conversions]
        if self.rest is not None:
            return self.rest.update_weight_conversions(weight_conversions, model)
        return super().update_weight_conversions(weight_conversions, model)

    def _by_expert(self, conversion: Any) -> Any:
        """Merge experts of a checkpoint one at a time, if a conversion merges them."""
        if not _touches(conversion, self.places) or not merges(conversion):
            return conversion
        by_expert = PackByExpert(self, conversion.operations)
        patterns = conversion._original_source_patterns, conversion._original_target_patterns
        return conversion.copy(*patterns, operations=[by_expert])

    def _without_experts(self, conversions: Any) -> list[Any]:
        return [each for each in conversions if not _touches(each, self.places)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, place in self.places.items():
            check_loaded(name, place)
        if self.rest is not None:
            self.rest._process_model_after_weight_loading(model, **kwargs)
        self.keep_conversions(model, model._weight_conversions or [])
        return model

    def keep_conversions(self, model: Any, conversions: list[Any]) -> None:
        """Keep ``save_pretrained`` from splitting packed weights by expert."""
        own = [as_it_was(each) for each in conversions]
        self.conversions = [each for each in own if not _is_of(self.rest, each)]
        model._weight_conversions = self._without_experts(self.conversions)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from drlora_torch.models.quantization.places import unpack_all

        unpack_all(model, dtype)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Leave the model to the quantizer of its rest, if there is one."""
        super().remove_quantization_config(model)
        model._weight_conversions = self.conversions
        if self.rest is not None:
            model.hf_quantizer, model.is_quantized = self.rest, True
            model.config.quantization_config = self.rest.quantization_config
            model.quantization_method = self.rest.quantization_config.quant_method


def _is_of(quantizer: HfQuantizer | None, conversion: Any) -> bool:
    """True if a conversion unpacks what a quantizer has packed, which is saved as it is."""
    makers = [getattr(op, "hf_quantizer", None) for op in getattr(conversion, "operations", ())]
    return quantizer is not None and quantizer in makers


def _touches(conversion: Any, names: Any) -> bool:
    """True if a conversion makes one of these weights out of others; a renaming does not."""
    if not hasattr(conversion, "operations"):
        return False
    patterns = conversion.target_patterns
    return any(re.search(pattern, name) for pattern in patterns for name in names)
