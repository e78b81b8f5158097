"""Kill drlora, and break its disk: ``python -m scripts.kills --help``."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before any library starts threads, which children would lack
os.environ["HF_HUB_OFFLINE"] = "1"

from scripts.kills.command import main  # noqa: E402

main()
