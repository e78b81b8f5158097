"""One thread, so that sums are taken in one order and the suite shares a small machine.

Without a GPU, Triton runs its kernels in an interpreter, which it must be told before its import.
"""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
