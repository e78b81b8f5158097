"""``model.save_pretrained`` while adapters are attached: they are written beside the base.

That is what Trainer, Accelerate and ``push_to_hub`` call, so that none of them can leave the
trained part behind. A Trainer gets the trained part alone, as it does from PEFT: its checkpoints
would hold the frozen base again and again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from drlora_core import atomic
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.residents import Residents, child_name, is_active
from drlora_torch.lifecycle.trained import show_trained
from drlora_torch.step.parameters import base_parameters
from drlora_torch.storage import checkpoint, hub

logger = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
METHOD, PEFT_FLAG = "save_pretrained", "_hf_peft_config_loaded"


def follow_saves(model: nn.Module, holder: nn.Module) -> Callable[[], None]:
    """Write the adapters of ``model`` wherever ``holder`` is saved; return the undo.

    Args:
        model: the adapted model.
        holder: the same, or a PeftModel around it.
    """
    inner = getattr(holder, METHOD, None)
    if inner is None or hasattr(inner, "drlora_holder"):
        return lambda: None

    @functools.wraps(inner)
    def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        folder, writes = Path(save_directory), _writes(args, kwargs)
        result = None
        trained_alone = holder is model and _is_called_by_trainer(kwargs)
        if not trained_alone:
            with _base_values(model), _without_flag(model):
                result = inner(save_directory, *args, **kwargs)
        if not writes:
            return result
        if trained_alone:
            write_adapters(model, folder)
            _write_trained(model, folder)
            return None
        try:
            write_adapters(model, folder)
        except CheckpointError as error:  # the base, which was asked for, is complete
            logger.error("the base model is in %s without its adapter: %s", folder, error)
            return result
        if kwargs.get("push_to_hub") and (active := _active(model)) is not None:
            repo = kwargs.get("repo_id") or folder.resolve().name
            hub.upload(active, folder, repo, kwargs.get("private"))
        return result

    vars(save_pretrained)["drlora_holder"] = True
    vars(holder)[METHOD] = save_pretrained
    return lambda: vars(holder).pop(METHOD, None)


def write_adapters(model: nn.Module, folder: Path) -> None:
    """Write the active adapter to a folder, and inactive ones to folders of their names in it."""
    for name, attached in Residents.of(model).by_name.items():
        place = folder if is_active(attached) else folder / name
        checkpoint.save(attached, place)
        logger.info("adapter %r is in %s", name, place)


def _write_trained(model: nn.Module, folder: Path) -> None:
    """Write what is trained of a model, for ``load_state_dict`` when a Trainer resumes."""
    residents = Residents.of(model).by_name.values()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    learning |= {name for attached in residents for name in base_parameters(attached)}
    inside = tuple(
        f"{name}.{child_name(attached.name)}." for attached in residents for name in attached.layers
    )
    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if key in learning or key.startswith(inside)
    }
    try:
        atomic.write_file(
            folder / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"})
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {folder / WEIGHTS}: {error}") from error


def _is_called_by_trainer(kwargs: dict[str, Any]) -> bool:
    """Only the Trainer passes ``state_dict=None`` by name, unless the model is sharded."""
    return "state_dict" in kwargs and kwargs["state_dict"] is None


def _writes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this process writes (``is_main_process``, the second parameter)."""
    return bool(kwargs.get("is_main_process", args[0] if args else True))


def _active(model: nn.Module) -> Attached | None:
    return Residents.of(model).active


@contextlib.contextmanager
def _base_values(model: nn.Module) -> Iterator[None]:
    """Inside, parameters of the base that learn have the base's values."""
    active = _active(model)
    if active is None or not active.trained_shown:
        yield
        return
    show_trained(active, False)
    try:
        yield
    finally:
        show_trained(active, True)


@contextlib.contextmanager
def _without_flag(model: nn.Module) -> Iterator[None]:
    """Inside, a quantised model does not say that PEFT's adapters are there: it is the base."""
    flag = vars(model).pop(PEFT_FLAG, None)
    try:
        yield
    finally:
        if flag is not None:
            setattr(model, PEFT_FLAG, flag)
