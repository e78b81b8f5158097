"""``model.save_pretrained`` while adapters are attached: they are written beside the base.

That is what Trainer, Accelerate and ``push_to_hub`` call, so that none of them can leave the
trained part behind. A Trainer gets the trained part alone, as it does from PEFT: its checkpoints
would hold the frozen base again and again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from drlora_core import atomic
from drlora_torch.attached import Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.lifecycle.residents import Residents, adapted_modules, child_name, is_active
from drlora_torch.lifecycle.trained import show_trained
from drlora_torch.lora import parts
from drlora_torch.step.parameters import all_names, base_parameters
from drlora_torch.step.sharded import is_sharded, writes
from drlora_torch.storage import checkpoint, checkpoint_checks, hub
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.travel import content, settle

logger = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
SAVE, LOAD, PEFT_FLAG = "save_pretrained", "load_adapter", "_hf_peft_config_loaded"


def follow_saves(model: nn.Module, holder: nn.Module) -> Callable[[], None]:
    """Write the adapters of ``model`` wherever ``holder`` is saved; return the undo.

    Args:
        model: the adapted model.
        holder: the same, or a PeftModel around it, which then also loads what it has saved.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(_replace(holder, SAVE, functools.partial(_saving, model, holder)))
        if holder is not model:
            undo.callback(_replace(holder, LOAD, functools.partial(_loading, model, holder)))
        return undo.pop_all().close


def _replace(holder: nn.Module, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Put a method of our own in place of one of ``holder``, once; return the undo."""
    inner = getattr(holder, name, None)
    if inner is None or hasattr(inner, "drlora_inner"):
        return lambda: None
    before = vars(holder).get(name)
    method = functools.wraps(inner)(make(inner))
    vars(method)["drlora_inner"] = inner
    vars(holder)[name] = method

    def undo() -> None:
        if vars(holder).get(name) is not method:
            return  # somebody has wrapped it since; without adapters it only passes on
        if before is None:
            del vars(holder)[name]
        else:
            vars(holder)[name] = before

    return undo


def _saving(model: nn.Module, holder: nn.Module, inner: Any) -> Any:
    """Make the ``save_pretrained`` of a model with adapters."""

    def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not Residents.of(model).by_name:
            return inner(save_directory, *args, **kwargs)
        folder, result = Path(save_directory), None
        given = kwargs.get("state_dict")
        given = None if given is None else dict(given)  # saving the base takes ours out of it
        by_trainer = holder is model and _is_called_by_trainer(kwargs)
        if not by_trainer or _has_adapters_of_peft(model):
            with (
                _base_values(model, kwargs) as arguments,
                without_flag(model),
                _without_lora(model, given),
            ):
                result = inner(save_directory, *args, **arguments)
        if not _takes_part(model, given, _writes(args, kwargs)):
            return result
        if by_trainer:
            write_adapters(model, folder)
            _write_trained(model, folder)
            return None
        try:
            write_adapters(model, folder, given)
        except CheckpointError as error:
            if _is_held_together(model):
                raise
            # the base, which was asked for, is complete
            logger.error("the base model is in %s without its adapter: %s", folder, error)
            return result
        active = _active(model)
        if kwargs.get("push_to_hub") and active is not None and writes(active):
            repo = kwargs.get("repo_id") or folder.resolve().name
            hub.upload(active, folder, repo, kwargs.get("private"))
        return result

    return save_pretrained


def _loading(model: nn.Module, holder: nn.Module, inner: Any) -> Any:
    """Make the ``load_adapter`` of a PeftModel around a model with adapters.

    Loading PEFT's adapter again, as a Trainer does when it resumes or takes the best model back,
    brings ours back too; loading another one beside it does not.
    """

    def load_adapter(model_id: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> Any:
        again = adapter_name in getattr(holder, "peft_config", {})
        found = read_adapters(model, Path(str(model_id))) if again else {}
        checked = {
            name: checkpoint.check_restorable(attached, saved, check_base=True)
            for name, attached in Residents.of(model).by_name.items()
            if (saved := found.get(name)) is not None
        }
        result = inner(model_id, adapter_name, *args, **kwargs)
        for name, state in checked.items():
            checkpoint.commit(Residents.of(model).by_name[name], state)
        return result

    return load_adapter


def read_adapters(model: nn.Module, folder: Path) -> dict[str, checkpoint_checks.Saved]:
    """Read what :func:`write_adapters` wrote, by name; empty where it wrote nothing.

    Raises:
        CheckpointError: an adapter of the model is not among them.
    """
    names = Residents.of(model).by_name
    if not names or not (folder / FILE_NAME).is_file():
        return {}
    saved = checkpoint.read(folder)
    found = {saved.name: saved}
    for name in names:
        if (folder / name / FILE_NAME).is_file():
            found[name] = checkpoint.read(folder / name)
    if missing := sorted(names.keys() - found.keys()):
        raise CheckpointError(
            f"{folder} holds adapter {', '.join(map(repr, found))}, but not {missing[0]!r} of this "
            "model; attach under the names of the saved run"
        )
    return found


def write_adapters(model: nn.Module, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write the active adapter to a folder, and inactive ones to folders of their names in it.

    Args:
        model: the adapted model.
        folder: made if it does not exist.
        state: the model's whole state dict, if processes that hold the model together have
            gathered it for the first one; else all of them must call.
    """
    for name, attached in Residents.of(model).by_name.items():
        place = folder if is_active(attached) else folder / name
        settle(attached)
        if state is not None and is_sharded(attached):
            checkpoint.write(place, *content(attached, state))
        else:
            checkpoint.save(attached, place)
        logger.info("adapter %r is in %s", name, place)


def _write_trained(model: nn.Module, folder: Path) -> None:
    """Write what is trained of a model, for ``load_state_dict`` when a Trainer resumes."""
    residents = Residents.of(model).by_name.values()
    learning = {id(p) for attached in residents for p in base_parameters(attached).values()}
    names = {n for n, p in model.named_parameters() if p.requires_grad or id(p) in learning}
    inside = tuple(
        f"{name}.{child_name(attached.name)}."
        for attached in residents
        for name in (*attached.layers, *attached.dense)
    )
    tensors = {
        key: parts.whole(value).cpu().contiguous()
        for key, value in model.state_dict().items()
        if key in names or key.startswith(inside)
    }
    if not all(map(writes, residents)):
        return
    try:
        atomic.write_file(
            folder / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"})
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"could not write {folder / WEIGHTS}: {error}") from error


def _is_called_by_trainer(kwargs: dict[str, Any]) -> bool:
    """Only the Trainer passes ``state_dict=None`` by name, unless the model is sharded."""
    return "state_dict" in kwargs and kwargs["state_dict"] is None


def _has_adapters_of_peft(model: nn.Module) -> bool:
    """True after ``model.add_adapter``: the model then saves those instead of itself."""
    return bool(getattr(model, PEFT_FLAG, False)) and hasattr(model, "peft_config")


@contextlib.contextmanager
def _without_lora(model: nn.Module, state: object) -> Iterator[None]:
    """Inside, a model that Transformers gathers before it writes is the base model alone."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    if state is None and _is_held_together(model):
        for attached in Residents.of(model).by_name.values():
            name = child_name(attached.name)
            taken += [
                (module, name, lora)
                for module, lora in adapted_modules(attached)
                if module._modules.pop(name, None) is not None
            ]
    try:
        yield
    finally:
        for module, name, lora in taken:
            module.add_module(name, lora)


def _takes_part(model: nn.Module, state: object, writes: bool) -> bool:
    """Whether this process has a part in writing the adapters.

    Where processes hold them together, all have, unless the whole state was gathered before.
    """
    return writes or (state is None and _is_held_together(model))


def _is_held_together(model: nn.Module) -> bool:
    return any(is_sharded(each) for each in Residents.of(model).by_name.values())


def _writes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this process writes (``is_main_process``, the second parameter)."""
    return bool(kwargs.get("is_main_process", args[0] if args else True))


def _active(model: nn.Module) -> Attached | None:
    return Residents.of(model).active


@contextlib.contextmanager
def _base_values(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside, parameters of the base that learn have the base's values, in a given state too.

    Yields the arguments to save with.
    """
    active = _active(model)
    shown = active is not None and active.trained_shown
    if active is not None and is_sharded(active) and kwargs.get("state_dict") is not None:
        if base_parameters(active):
            logger.warning("the base model is saved with the trained routers and modules_to_save")
        yield kwargs
        return
    if shown and active is not None:
        show_trained(active, False)
    try:
        if (given := kwargs.get("state_dict")) is not None:
            own = {
                alias: model.get_parameter(alias).detach()
                for attached in Residents.of(model).by_name.values()
                for aliases in all_names(attached).values()
                for alias in aliases
                if alias in given
            }
            kwargs = {**kwargs, "state_dict": {**given, **own}}
        yield kwargs
    finally:
        if shown and active is not None:
            show_trained(active, True)


@contextlib.contextmanager
def without_flag(model: nn.Module) -> Iterator[None]:
    """Inside, a quantized model without adapters of PEFT does not say that there are any."""
    flag = None if _has_adapters_of_peft(model) else vars(model).pop(PEFT_FLAG, None)
    try:
        yield
    finally:
        if flag is not None:
            setattr(model, PEFT_FLAG, flag)
