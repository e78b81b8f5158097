"""One of the processes that ``drlora finetune --processes`` starts.

It runs the command line, but leaves the words of an error to the process that started it, so that
they are said once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from drlora_core.cli.app import print_error, run

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun looks for the error of a process


def tell_launcher(text: str) -> None:
    """Write an error where torchrun reads it."""
    if file := os.environ.get(ERROR_FILE):
        Path(file).write_text(json.dumps({"message": text, "timestamp": time.time()}))
    else:
        print_error(text)


if __name__ == "__main__":
    run(sys.argv[1:], show=tell_launcher)
