"""Several commands of drlora, one after the other, in the processes that torchrun has started.

Its arguments are JSON lists, each with the arguments of one command. Accelerate refuses tensor
parallelism on CPUs, though its data loader and Transformers' layers work there; here it is let.
"""

from __future__ import annotations

import json
import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from drlora_core.cli import main
from drlora_torch.finetune import sharding


def allow_cpus() -> None:
    """Let Accelerate and drlora take processes on CPUs for those with a device."""
    Accelerator.multi_device = property(lambda self: self.use_distributed)
    sharding.can_share_features = lambda: True


if __name__ == "__main__":
    allow_cpus()
    for command in map(json.loads, sys.argv[1:]):
        AcceleratorState._reset_state()  # keeps the processes, forgets their mesh
        try:
            main(command)
        except SystemExit as stopped:
            if stopped.code:
                raise
