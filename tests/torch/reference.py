"""Slow, obvious references: dense weights W + s B A, and experts computed pair by pair.

Shape letters: T tokens, K experts per token, N experts, I input and O output features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.torch.helpers import owned, projections


@torch.no_grad()
def expert_delta(lora: Any, projection: str, expert: int) -> Tensor:
    """s * sum_j outer(B_j, A_j), [O, I], dimension by dimension."""
    slots = dict(lora.items())[projection]
    delta = torch.zeros(slots.lora_B.shape[1], slots.lora_A.shape[1], dtype=slots.lora_A.dtype)
    for slot in owned(lora, expert):
        delta += torch.outer(slots.lora_B[slot], slots.lora_A[slot])
    return lora.scaling * delta


@torch.no_grad()
def dense_copy(base: nn.Module, adapter: Any) -> Any:
    """Copy the base model (made before ``attach``), write W + s B A, run it with eager experts.

    Every expert weight of the copy requires grad, for the chain rule.
    """
    dense = copy.deepcopy(base)
    if hasattr(dense, "set_experts_implementation"):
        dense.set_experts_implementation("eager")
    else:
        dense.experts.config._experts_implementation = "eager"
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    for name, projection, lora, _ in projections(adapter):
        module = dense.get_submodule(name)
        weight = getattr(module, projection)
        for expert in range(weight.shape[0]):
            delta = expert_delta(lora, projection, expert)
            delta = delta.T if module.is_transposed else delta
            weight[expert] = (weight[expert].to(delta.dtype) + delta).to(weight.dtype)
        weight.requires_grad_(True)
    return dense


def chain_rule(dense: nn.Module, adapter: Any) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Gradients of A and B that follow from those of the dense weights, 0 at free slots.

    dL/dA_j = s B_j^T dL/dW and dL/dB_j = s dL/dW A_j.
    """
    expected = {}
    for name, projection, lora, slots in projections(adapter):
        module = dense.get_submodule(name)
        gradient = getattr(module, projection).grad
        grad_A, grad_B = torch.zeros_like(slots.lora_A), torch.zeros_like(slots.lora_B)
        for expert in range(lora.table.num_experts):
            dW = gradient[expert].to(slots.lora_A.dtype)
            dW = dW.T if module.is_transposed else dW
            for slot in owned(lora, expert):
                grad_A[slot] = lora.scaling * (slots.lora_B[slot].detach() @ dW)
                grad_B[slot] = lora.scaling * (dW @ slots.lora_A[slot].detach())
        expected[name, projection] = (grad_A, grad_B)
    return expected


def experts_pair_by_pair(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts as their definition says, one (token, expert) pair at a time, dense weights.

    Indices outside the experts contribute nothing.
    """
    outputs = []
    for token in range(hidden_states.shape[0]):
        total = torch.zeros_like(hidden_states[token])
        for choice in range(top_k_index.shape[1]):
            expert = int(top_k_index[token, choice])
            if expert < module.down_proj.shape[0]:
                row = one_expert(module, expert, hidden_states[token])
                total = total + row * top_k_weights[token, choice]
        outputs.append(total)
    return torch.stack(outputs) if outputs else torch.zeros_like(hidden_states)


def one_expert(module: Any, expert: int, row: Tensor) -> Tensor:
    """One expert's output for one token, before the routing weight."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for name in (first, "down_proj"):
        weight = getattr(module, name)[expert]
        row = row @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            row = row + getattr(module, f"{name}_bias")[expert]
        if name == first:
            row = module._apply_gate(row[None])[0] if module.has_gate else module.act_fn(row)
    return module.post_expert_norm(row) if module.has_post_expert_norm else row
