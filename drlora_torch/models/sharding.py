"""Models whose parameters are spread over processes, which drlora does not train yet.

Each process would train a LoRA of its own, or none, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import distributed, nn

from drlora_torch.errors import AttachError

RIGHT = (
    "drlora trains models that every process holds whole; wrap such a model after attach:\n"
    "    adapter = attach(model, engine)\n"
    "    parallel = DistributedDataParallel(model)"
)
SIZES = ("tp_size", "ep_size", "fsdp_size", "pp_size", "dp_replicate_size")


def check_whole(model: nn.Module) -> None:
    """Refuse to adapt a model that is spread over processes.

    Raises:
        AttachError: ``fully_shard`` or a DistributedConfig of Transformers has sharded it.
    """
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    sizes = {name: getattr(config, name, None) or 1 for name in SIZES}
    spread = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
    if spread or is_sharded(model.parameters()):
        how = f"DistributedConfig({spread})" if spread else "fully_shard"
        raise AttachError(f"the model is sharded over processes by {how}; {RIGHT}")


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """True if a process holds only a part of some parameter, a DTensor."""
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in parameters)
