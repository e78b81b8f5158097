"""The processes of a run: torchrun or Accelerate may start several, of which the first writes."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def join_processes() -> PartialState:
    """Meet the other processes of the run, if there are any; the state of all of them."""
    return PartialState(cpu=not torch.cuda.is_available())


def agree_on(path: Path) -> Path:
    """The path of the first process: a default name holds the time, which may differ."""
    return Path(broadcast_object_list([str(path)])[0])
