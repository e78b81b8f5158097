"""Pack the weights of experts between a checkpoint and a model: operations of Transformers.

Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, MergeModulelist

Quantizer = Any
"""An ``ExpertsQuantizer``, whose module imports this one."""


class Pack(ConversionOps):
    """Packs a weight that has been read, unless that has been done expert by expert."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        from drlora_torch.quantized import holders

        quantizer = self.quantizer
        if full_layer_name not in quantizer.places:
            assert quantizer.rest is not None, "only experts need this quantizer"
            own = quantizer.rest.get_quantize_ops()
            return own.convert(input_dict, full_layer_name=full_layer_name, **kwargs)  # type: ignore[no-any-return]
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        place = quantizer.places[full_layer_name]
        form: Any = holders.formats(place.holder)[place.name]
        packed = weight if isinstance(weight, dict) else form.pack(weight.to(form.dtype))
        return {full_layer_name + suffix: tensor for suffix, tensor in packed.items()}


class PackByExpert(ConversionOps):
    """Merges and packs one expert at a time what a checkpoint has as a tensor for each expert.

    Merging all of them first, as Transformers does, holds the weight twice.
    """

    def __init__(self, quantizer: Quantizer, operations: list[Any]) -> None:
        self.quantizer = quantizer
        self.operations = operations

    def __deepcopy__(self, memo: object) -> PackByExpert:
        return PackByExpert(self.quantizer, self.operations)  # not the model behind the quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        from drlora_torch.quantized import holders

        place = self.quantizer.places.get(full_layer_name)
        form: Any = None if place is None else holders.formats(place.holder)[place.name]
        if form is None or any(len(each) != form.num_experts for each in input_dict.values()):
            return self._merge(input_dict, full_layer_name, kwargs)
        packed = None
        for expert in range(form.num_experts):
            one = {pattern: [tensors[expert]] for pattern, tensors in input_dict.items()}
            merged = self._merge(one, full_layer_name, kwargs)
            ((name, weight),) = merged.items()
            if weight.numel() * form.num_experts != math.prod(form.shape):
                return self._merge(input_dict, full_layer_name, kwargs)
            packed = form.empty(weight.device) if packed is None else packed
            values = weight.to(form.dtype).reshape(form.expert_shape)
            form.pack_expert(packed, expert, values)
            for tensors in input_dict.values():
                tensors[expert] = None  # its memory is free
        return {name: packed}

    def _merge(self, tensors: dict[str, Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, full_layer_name=name, **options)
        return tensors


def merges(conversion: Any) -> bool:
    """True if a conversion begins by stacking experts, so that it can do so with one alone."""
    first = conversion.operations[0]
    return isinstance(first, MergeModulelist) and first.dim == 0


def as_it_was(conversion: Any) -> Any:
    """The conversion that packs nothing."""
    operations: Any = getattr(conversion, "operations", ())
    if not any(isinstance(each, PackByExpert) for each in operations):
        return conversion
    patterns = conversion._original_source_patterns, conversion._original_target_patterns
    return conversion.copy(*patterns, operations=operations[0].operations)
