"""An adapter directory of PEFT: its two files, its names, and what its configuration means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drlora_core import atomic
from drlora_core.errors import describe_validation_error
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.trained import trained_values
from drlora_torch.options import RouterMode
from drlora_torch.step.parameters import all_names, base_parameters
from drlora_torch.storage.finite import check_weights
from drlora_torch.storage.peft.config import PeftConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT puts it before every name of a tensor."""
Linear = tuple[str, str, str]
"""Names of a layer, of an expert in it (may be empty), and of a Linear in the expert."""


def write(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files; older ones are replaced only once both are complete."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in held.items():
        check_weights(name, tensor)
    try:
        with atomic.replaced_files(path) as folder:
            atomic.write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
            atomic.write_file(
                folder / WEIGHTS_FILE, lambda part: save_file(held, part, metadata={"format": "pt"})
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write the export to {path}: {error}") from error


def read(path: Path) -> tuple[dict[str, Tensor], PeftConfig]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"no PEFT adapter at {path}: it has no {name}")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the PEFT adapter at {path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG_FILE} does not hold a configuration")
    try:
        return tensors, PeftConfig.model_validate(config)
    except ValidationError as error:
        what = describe_validation_error(error)
        raise CheckpointError(f"{path / CONFIG_FILE} cannot be read: {what}") from error


def whole_modules(attached: Attached) -> dict[str, nn.Module]:
    """Modules of the base that learn whole, by name: routers and ``modules_to_save``.

    Those that share their parameters are among them: PEFT trains and loads a copy of each.
    """
    found: dict[str, nn.Module] = dict(attached.modules)
    if attached.options.router is not RouterMode.FROZEN:
        for layer in attached.layers.values():
            assert layer.router is not None
            found[str(layer.record.router)] = layer.router
    named = dict(attached.model.named_modules())
    for names in all_names(attached).values():
        for name in names:
            owner = name.rpartition(".")[0]
            if not any(f"{owner}.".startswith(f"{module}.") for module in found):
                found[owner] = named[owner]
    return found


def module_values(attached: Attached) -> dict[str, Tensor]:
    """Values of the modules that learn whole, buffers too, by name."""
    values = {
        f"{name}.{part}": value
        for name, module in whole_modules(attached).items()
        for part, value in module.state_dict().items()
    }
    trained = trained_values(attached)
    by_parameter = {id(p): trained[name] for name, p in base_parameters(attached).items()}
    for name, module in whole_modules(attached).items():
        for part, parameter in module.named_parameters(remove_duplicate=False):
            values[f"{name}.{part}"] = by_parameter[id(parameter)]
    return values


def own_name(name: str) -> str:
    """Name of a module in the model itself, where that is already inside a PeftModel."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def joined(*parts: str) -> str:
    """Dotted name of parts, of which some may be empty."""
    return ".".join(part for part in parts if part)


def pattern(linears: Iterable[Linear]) -> str:
    r"""Regular expression of the names of Linears, to match in full.

    All experts of a layer have the same Linears. PEFT tries every pattern for every module, so
    there is one for each rank: one for each expert would cost the square of their number.

    Example:
        >>> pattern([("layers.0", "experts.0", "w1"), ("layers.1", "experts.0", "w1")])
        '(?:layers\\.0|layers\\.1)\\.(?:experts\\.0)\\.(?:w1)'
    """
    parts: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # ordered sets
    for layer, expert, projection in linears:
        experts, projections = parts.setdefault(layer, ({}, {}))
        experts[expert] = projections[projection] = None
    layers: dict[tuple[tuple[str, ...], ...], list[str]] = {}  # those with equal parts together
    for layer, names in parts.items():
        layers.setdefault(tuple(map(tuple, names)), []).append(layer)
    return "|".join(
        r"\.".join(
            f"(?:{'|'.join(map(re.escape, names))})" for names in (alike, *rest) if any(names)
        )
        for rest, alike in layers.items()
    )


def number(value: float) -> float:
    """A number as configurations have it: an int where it is whole."""
    return int(value) if float(value).is_integer() else value
