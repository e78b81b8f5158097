"""Models from their configuration alone: every family, no weights.

They are built on the meta device, so they take no memory. ``read_shape`` is the entry point of the
group ``drlora.shapes``, by which ``drlora plan`` finds it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from drlora_core.errors import DRLoRAError
from drlora_core.model_shape import LayerShape, ModelShape, check_depths, read_json, token_sizes
from drlora_torch.errors import FOREIGN_CODE, ModelError, needs_foreign_code
from drlora_torch.models.discovery import find_layers


def read_shape(source: str) -> ModelShape:
    """Read the MoE layers of a model.

    Args:
        source: a folder with a config.json, such a file, or a hub id (then only its configuration
            is downloaded).

    Raises:
        ModelError: there is no such file or hub id, or Transformers does not know the model or
            cannot build it from this configuration, or it has no MoE layer. Code that comes with a
            model is never run.
        LayoutError: the file is not JSON, or not a configuration.

    Example:
        >>> from drlora_torch.embedded import MODEL_DIR
        >>> shape = read_shape(str(MODEL_DIR))
        >>> shape.model_type, shape.layers[0].num_experts
        ('olmoe', 16)
    """
    config = _read_config(source)
    model = _build(source, config, None)
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


def build_skeleton(source: str, quantization: str = "none") -> nn.Module:
    """Build a model on the meta device, with every tensor as ``from_pretrained`` would make it.

    Args:
        source: as of :func:`read_shape`.
        quantization: how the experts are stored, as of ``drlora finetune --quantization``.

    Returns:
        The model, in the data type of its configuration.

    Raises:
        ModelError: as :func:`read_shape`; also a quantization that is not that of the checkpoint.
    """
    config = _read_config(source)
    wanted: Any = None
    if quantization in ("fp8", "mxfp4"):
        config = _keep_packed(source, quantization)
    elif quantization != "none":
        from drlora_torch.models.quantization.quantizer import Experts4bitConfig

        wanted = Experts4bitConfig(quantization)
    stored = getattr(config, "quantization_config", None)
    is_packed = wanted is not None or stored is not None
    return _build(source, config, _quantizer(source, config, wanted) if is_packed else None)


def check_config(source: str) -> str:
    """Refuse a config.json of more layers than any model has, before Transformers builds any.

    Returns:
        What Transformers may read: a path, or the hub id.

    Raises:
        ModelError: the folder has no config.json.
        LayoutError: it is no configuration, or has too many layers.
        OSError: there is no such hub id.
    """
    path, name = Path(source).expanduser(), source
    if os.path.exists(path):  # Path.exists raises for names that are too long
        name = str(path)
        if path.is_dir() and not (path / "config.json").is_file():
            raise ModelError(f"{source!r} is not the folder of a model: it has no config.json")
        read_json(path)
    found, _ = PreTrainedConfig.get_config_dict(name)
    check_depths(path, found)  # that of a hub id, or a file that config.json names
    return name


def _read_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(check_config(source), trust_remote_code=False)
    except DRLoRAError:
        raise
    except OSError as error:
        here = os.path.exists(Path(source).expanduser())
        where = "cannot be read" if here else "is no file or folder here, and on the hub"
        raise ModelError(f"{source!r} {where}: {_first_sentence(error)}") from error
    except Exception as error:  # every family checks its fields in its own way
        raise _cannot_build(source, error) from error


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


def _cannot_build(source: str, error: Exception) -> ModelError:
    if needs_foreign_code(error):
        return ModelError(f"Transformers cannot build the model of {source}: {FOREIGN_CODE}")
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return ModelError(
        f"Transformers cannot build the model of {source}: {type(error).__name__}: {reason}"
    )


def _keep_packed(source: str, quantization: str) -> Any:
    from drlora_torch.models.quantization.stored_quantizers import packed_config

    config = packed_config(source)
    found = config.quantization_config["stored"]["quant_method"]
    if found != quantization:
        raise ModelError(f"{source!r} is quantized with {found}; use --quantization {found}")
    return config


def _quantizer(source: str, config: Any, wanted: Any) -> Any:
    """The quantizer with which Transformers would load; None if it knows none."""
    from transformers.quantizers.auto import get_hf_quantizer

    try:
        quantizer, *_ = get_hf_quantizer(config, wanted, None, True, {})
    except ModelError:
        raise
    except Exception as error:  # of the libraries that quantize
        raise _cannot_build(source, error) from error
    return quantizer


def _build(source: str, config: Any, quantizer: Any) -> nn.Module:
    try:
        if quantizer is not None:
            config.dtype = quantizer.update_dtype(config.dtype)
        model = _build_on_meta(config)
        if quantizer is not None:
            quantizer.preprocess_model(model, dtype=config.dtype, device_map=None)
    except ModelError:
        raise
    except Exception as error:  # every family checks its fields in its own way
        raise _cannot_build(source, error) from error
    return model


def _build_on_meta(config: Any) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto

    if (own := _architecture(config)) is not None:
        with torch.device("meta"):
            built: nn.Module = own._from_config(config)
        return built
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        builder = AutoModelForCausalLM
    elif type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        builder = AutoModelForSeq2SeqLM
    else:
        builder = AutoModel
    with torch.device("meta"):
        model: nn.Module = builder.from_config(config, trust_remote_code=False)
    return model


def _architecture(config: Any) -> Any:
    """The class of the checkpoint, as its configuration names it; None if it names none.

    Classes of models with a vision tower are not those that AutoModelForCausalLM builds.
    """
    import transformers

    for name in config.architectures or ():
        found: Any = getattr(transformers, name, None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and found.config_class is type(config):
            return found
    return None


def _layers(model: nn.Module) -> tuple[LayerShape, ...]:
    found = []
    for layer in find_layers(model, on_meta=True):
        if layer.obstacle is not None or layer.only_on_request:
            continue
        number = re.search(r"\.(\d+)\.", f".{layer.name}.")
        sizes = {n: (s.in_features, s.out_features) for n, s in layer.projections.items()}
        found.append(LayerShape(int(number[1]) if number else 0, layer.num_experts, sizes))
    return tuple(found)
