"""Does a training step wait for the device? torch says where, if it is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.optim import AdamW
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora_torch
from benchmarks.methods import Training
from drlora_core import AllocatorConfig, AllocatorEngine

OWN = "drlora_torch"


def locate(step: Callable[[], object], device: torch.device) -> tuple[list[str], list[str]]:
    """Where three steps wait for a GPU: in drlora, and elsewhere, as ``file:line``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(3):
                step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    own = sorted({where for where in waits if OWN in where})
    return own, sorted({where for where in waits if OWN not in where})


def of_blocks(training: Training, device: torch.device) -> tuple[list[str], list[str]]:
    """Where a step of blocks waits; without padding."""
    for _ in range(2):
        training()
    return locate(training, device)


def of_model(device: torch.device, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """Where a step of a whole model waits.

    With padding, two micro-batches and clipping; 16 layers, between two growth events.
    """
    config = OlmoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=16,
        num_attention_heads=4, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = OlmoeForCausalLM(config).to(device, dtype)
    growth = AllocatorConfig(
        r_init=2, r_target=4, r_max=8, warmup_steps=0, growth_interval=20, growth_end=40
    )
    adapter = drlora_torch.attach(model, AllocatorEngine(growth))
    optimizer = AdamW(adapter.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(1, 128, (4, 32), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[:2, :5] = 0

    def step() -> None:
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(22):  # past the first event, so that rows are newborn
        step()
    return locate(step, device)
