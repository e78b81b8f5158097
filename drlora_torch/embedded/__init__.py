"""The small model and the task that ``drlora finetune`` uses when it is given neither.

Both were made by the scripts in ``scripts/embedded`` and ship inside the package, so the default
run needs no download. Only paths live here, so that importing this costs nothing.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR: Path = _HERE / "model"
"""An OLMoE with its tokenizer, as ``from_pretrained`` reads them; its README is the model card."""

TRAIN_FILE: Path = _HERE / "task" / "train.jsonl"
"""Rows to fine-tune on, with the fields ``prompt`` and ``completion``."""

TEST_FILE: Path = _HERE / "task" / "test.jsonl"
"""Rows to evaluate on; none of their prompts is among the training rows."""

__all__ = ["MODEL_DIR", "TEST_FILE", "TRAIN_FILE"]
