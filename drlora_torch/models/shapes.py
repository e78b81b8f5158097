"""The MoE layers of a model from its configuration alone: every family, no weights.

The model is built on the meta device, so it takes no memory. This is the entry point of the group
``drlora.shapes``, by which ``drlora plan`` finds it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from drlora_core.model_shape import LayerShape, ModelShape, token_sizes
from drlora_torch.errors import ModelError
from drlora_torch.models.conventions import find_convention
from drlora_torch.models.discovery import discover


def read_shape(source: str) -> ModelShape:
    """Read the MoE layers of a model.

    Args:
        source: a folder with a config.json, such a file, or a hub id (then only its configuration
            is downloaded).

    Raises:
        ModelError: Transformers does not know the model, or cannot build it from this
            configuration, or it has no MoE layer. Code that comes with a model is never run.
        OSError: there is no such file or hub id.

    Example:
        >>> from drlora_torch.embedded import MODEL_DIR
        >>> shape = read_shape(str(MODEL_DIR))
        >>> shape.model_type, shape.layers[0].num_experts
        ('olmoe', 16)
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model = _build_on_meta(config)
    except OSError:
        raise
    except Exception as error:  # every family checks its fields in its own way
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"Transformers cannot build the model of {source}: {type(error).__name__}: {lines[0]}"
        ) from error
    layers = _layers(model)
    if not layers:
        raise ModelError(f"{source} has no MoE layer that drlora knows: {type(model).__name__}")
    text = config.get_text_config()
    return ModelShape(
        model_type=str(config.model_type),
        num_layers=int(text.num_hidden_layers),
        layers=layers,
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        **token_sizes(text.to_dict()),
    )


def _build_on_meta(config: Any) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto

    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        builder = AutoModelForCausalLM
    elif type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        builder = AutoModelForSeq2SeqLM
    else:
        builder = AutoModel
    with torch.device("meta"):
        model: nn.Module = builder.from_config(config, trust_remote_code=False)
    return model


def _layers(model: nn.Module) -> tuple[LayerShape, ...]:
    """Sizes come from the conventions: discovery counts weights on the meta device as obstacles."""
    found = []
    for layer in discover(model):
        module = model.get_submodule(layer.name)
        convention = find_convention(module)  # None for experts that are refused
        if convention is None or layer.only_on_request or layer.num_experts == 0:
            continue
        number = re.search(r"\.(\d+)\.", f".{layer.name}.")
        sizes = {
            name: (shape.in_features, shape.out_features)
            for name, shape in convention.projection_shapes(module).items()
        }
        found.append(LayerShape(int(number[1]) if number else 0, layer.num_experts, sizes))
    return tuple(found)
