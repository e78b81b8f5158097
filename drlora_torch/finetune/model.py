"""Load the model and tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from drlora_core.notebook import count
from drlora_torch.errors import FOREIGN_CODE, ModelError, needs_foreign_code
from drlora_torch.finetune.options import FinetuneOptions, is_local
from drlora_torch.finetune.sharding import Sharding
from drlora_torch.models.quantization.quantizer import Experts4bitConfig
from drlora_torch.models.quantization.stored_quantizers import packed_config
from drlora_torch.models.shapes import check_config
from drlora_torch.models.sharding import is_sharded


def load_model(
    name: str,
    dtype: str = "auto",
    sharding: Sharding | None = None,
    quantization: str = "none",
    in_4bit: bool = False,
) -> nn.Module:
    """Load a causal language model from a folder or by its id on the Hugging Face Hub.

    The dtype ``auto`` is float32 on a CPU, where half precision is slow, and that of the
    checkpoint on a GPU. A model that cannot be loaded so, or needs code of its own, is a
    ModelError.
    """
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    storage = _storage(name, dtype, quantization, in_4bit)
    if sharding is None or not sharding.is_sharded:
        return _load_whole(name, dtype=dtype, **storage)
    if storage:
        raise ModelError(
            f"packed experts cannot be spread with {' '.join(sharding.words)}; leave that, or "
            "--quantization and --load-in-4bit, out"
        )
    config = sharding.distributed_config()
    model = _load_whole(name, dtype=dtype, distributed_config=config)
    if not is_sharded(model):
        raise ModelError(
            f"Transformers does not shard {type(model).__name__} with {' '.join(sharding.words)}; "
            "use --fsdp-size alone, or none of these options"
        )
    return model


def _load_whole(name: str, **arguments: Any) -> nn.Module:
    """Load a model of which every matrix is in its files, in the shape that config.json says.

    Transformers would make the others random and go on.
    """
    model: nn.Module
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name them here
    model, found = _load(AutoModelForCausalLM, name, **options, **arguments)
    if wrong := sorted(found["mismatched_keys"]):
        key, stored, expected = wrong[0]
        raise ModelError(
            f"the files of {name!r} have {count(len(wrong), 'weight')} of another shape than its "
            f"config.json says, first {key!r}: {list(stored)}, not {list(expected)}"
        )
    # Biases of routers are often left out, and are zero then.
    matrices = {key for key, weight in model.named_parameters() if weight.ndim > 1}
    if missing := sorted(matrices & set(found["missing_keys"])):
        raise ModelError(
            f"the files of {name!r} lack {count(len(missing), 'weight')} of the model in its "
            f"config.json, first {missing[0]!r}; is a file missing?"
        )
    return model


def load_base(options: FinetuneOptions, sharding: Sharding | None = None) -> nn.Module:
    """Load the base model of a run."""
    return load_model(
        options.model,
        options.dtype,
        sharding,
        options.quantization,
        options.load_in_4bit,
    )


def _storage(name: str, dtype: str, quantization: str, in_4bit: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` by which weights are packed, or stay so."""
    if quantization in ("fp8", "mxfp4"):
        if in_4bit:
            raise ModelError(f"--load-in-4bit packs what --quantization {quantization} keeps")
        config = packed_config(_source(name))
        found = config.quantization_config["stored"]["quant_method"]
        if found != quantization:
            raise ModelError(f"{name!r} is quantized with {found}; use --quantization {found}")
        return {"config": config}
    if quantization == "none" and not in_4bit:
        return {}
    kind = "nf4" if quantization == "none" else quantization
    compute = None if dtype == "auto" else dtype
    rest = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute or "bfloat16",
    )
    return {"quantization_config": Experts4bitConfig(kind, rest=rest if in_4bit else None)}


def load_config(name: str) -> Any:
    """Load the configuration of a model."""
    return _load(AutoConfig, name)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model."""
    return _load(AutoTokenizer, name)


def _source(name: str) -> str:
    return str(Path(name).expanduser()) if is_local(name) else name


def _load(loader: Any, name: str, **arguments: Any) -> Any:
    source = _source(name)
    if is_local(name) and not Path(source, "config.json").is_file():
        raise ModelError(f"{name!r} is not the folder of a model: it has no config.json")
    try:
        check_config(source)
        # Without it Transformers asks on the terminal, and runs the code after a "y".
        return loader.from_pretrained(source, trust_remote_code=False, **arguments)
    except ModelError:
        raise
    except Exception as error:  # the hub client, safetensors and configurations have their own
        foreign = needs_foreign_code(error)
        reason = FOREIGN_CODE if foreign else str(error).strip().split("\n")[0]
        raise ModelError(f"model {name!r} could not be loaded: {reason}") from error
