"""A device without data, and readbacks that arrive when they like: what waits for a device is seen.

Tensors on torch's device ``meta`` have shapes and no values. Training runs there on any machine;
whatever would read a value raises an error, and what is copied between devices is seen here.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drlora_torch.step import closing, exchange, tracker
from drlora_torch.step.readback import Readback

DEVICE = "meta"


class _Uploads(TorchFunctionMode):
    """Notes numbers of the host that become tensors of a device; torch has no operation for that
    where the device has no data."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.device.type == DEVICE:
            self._found.append(f"{func.__name__} in {_own_line()}")
        return result


class Watch(TorchDispatchMode):
    """Notes every operation inside that reads a device, or copies from one device to another."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._uploads = _Uploads(self.found)

    def __enter__(self) -> Watch:
        self._uploads.__enter__()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._uploads.__exit__(*failure)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # a number of the host among tensors of a device is an argument of the kernel
        devices = {t.device.type for t in (*given, *made) if t.dim() or "copy" in name}
        reads = name.startswith(self.READS) and any(t.device.type == DEVICE for t in given)
        if reads or len(devices) > 1:
            self.found.append(f"{name} in {_own_line()}")
        return result


def _own_line() -> str:
    """The innermost line of drlora that is running."""
    frames = [frame for frame in traceback.extract_stack() if "drlora_torch" in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "other code"


class NoData:
    """A readback from the device without data: it says that all went well."""

    is_on_host = False

    def __init__(self, values: Tensor) -> None:
        assert values.dim() == 1
        self.size, self.asked = len(values), False

    def values(self) -> np.ndarray:
        self.asked = True
        found = np.ones(self.size)
        found[:4] = 0.0  # of the probe, and whether the optimizer skipped the step
        return found


class LateReadback:
    """Values of the CPU that arrive as late as those of a GPU may."""

    is_on_host = False

    def __init__(self, values: Tensor) -> None:
        self._values = values.clone()

    def values(self) -> np.ndarray:
        return self._values.numpy()


def _replace_readback(monkeypatch: pytest.MonkeyPatch, make: Callable[[Tensor], Any]) -> None:
    for module in (closing, exchange):
        monkeypatch.setattr(module, "Readback", make)


def arrive_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device that the host would wait for."""
    _replace_readback(monkeypatch, LateReadback)
    monkeypatch.setattr(tracker, "is_on_host", lambda tensor: False)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> list[NoData]:
    """Let a model be trained on the device without data; all readbacks from there, in order."""
    made: list[NoData] = []
    asked = torch.is_autocast_enabled

    def read_back(values: Tensor) -> Any:
        if values.device.type != DEVICE:
            return Readback(values)
        made.append(NoData(values))
        return made[-1]

    def is_autocast_enabled(kind: str | None = None) -> bool:
        return kind != DEVICE and (asked() if kind is None else asked(kind))

    _replace_readback(monkeypatch, read_back)
    monkeypatch.setattr(torch, "is_autocast_enabled", is_autocast_enabled)
    check = "_device_dtype_check_for_fused"
    monkeypatch.setattr(sys.modules["torch.optim.adam"], check, lambda *_, **__: None)
    return made
