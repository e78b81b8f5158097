"""A whole model fine-tuned on the CPU and on the device: are the decisions the same?"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.embedded import MODEL_DIR, TRAIN_FILE

ROWS = 8


class Run(NamedTuple):
    """Loss of every step, and the growth of every event by layer."""

    losses: list[float]
    growth: list[dict[str, list[int]]]


def train(device: torch.device, steps: int, kernel: str = "auto") -> Run:
    """Fine-tune the model that drlora ships on its own task, in float32, with eight events."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).to(device).train()
    config = AllocatorConfig(
        r_init=2, r_target=4, r_max=16, warmup_steps=steps // 5,
        growth_interval=max(1, steps // 12), growth_end=steps,
    )  # fmt: skip
    adapter = drlora_torch.attach(model, AllocatorEngine(config), kernel=kernel)
    optimizer = AdamW(adapter.parameters(), lr=5e-3, fused=True)
    lines = TRAIN_FILE.read_text().splitlines()
    losses = []
    for step in range(steps):
        rows = [json.loads(line) for line in lines[step * ROWS : (step + 1) * ROWS]]
        texts = [row["prompt"] + row["completion"] for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    growth = [
        {name: delta.tolist() for name, delta in event.deltas.items()} for event in adapter.events
    ]
    return Run(torch.stack(losses).tolist(), growth)


def count_equal(left: Run, right: Run) -> tuple[int, int]:
    """Events with the same decision for every expert, before the first that differs; and all."""
    pairs = list(zip(left.growth, right.growth, strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return equal, len(pairs)
