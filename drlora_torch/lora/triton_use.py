"""Where Triton's kernels run: on NVIDIA and AMD GPUs, where Triton is installed."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def runs_triton(inputs: Tensor) -> bool:
    """True where a tensor is one for Triton's kernels."""
    on_gpu = inputs.is_cuda and inputs.dtype != torch.float64 and not is_fake(inputs)
    return on_gpu and inputs.numel() > 0 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
