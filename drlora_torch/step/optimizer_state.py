"""The state that the user's optimizer keeps for slots that change owner.

Shape letters: P rank slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.lora.slots import IntArray


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: nn.Parameter, slots: IntArray) -> None:
    """Zero the state that an optimizer keeps for rows of a parameter [P, ...].

    Per-row state has the parameter's number of axes and P rows (Adam, SGD, torch's Adafactor), or
    is the row factor of Transformers' Adafactor.
    """
    index = torch.from_numpy(slots).to(parameter.device)
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        same_rows = value.shape[0] == parameter.shape[0]
        if same_rows and (value.dim() == parameter.dim() or key == "exp_avg_sq_row"):
            value[index] = 0
