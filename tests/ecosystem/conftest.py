"""One thread, so that sums are taken in one order and the suite shares a small machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
