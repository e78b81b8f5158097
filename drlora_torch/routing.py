"""Routing statistics: what the router does with the counted tokens of one optimizer step.

A token counts once, in a training forward of the whole model: not in evaluation, under
``no_grad``, while paused, in padding, or when gradient checkpointing runs a layer again.

Shape letters: T tokens, K experts per token, N experts.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A forward that is running: whether it counts, and its attention mask [batch, length]."""

    counts: bool
    mask: Tensor | None
    module: nn.Module | None = None
    length: int | None = None
    """Tokens in each row of the input, where the forward was given any."""
    kinds: Tensor | None = None
    """What each token is (text or image), where the model tells its layers, [batch, length]."""

    def token_mask(self, num_tokens: int) -> Tensor | None:
        """Which of the tokens that a layer receives count, bool [T]; None for all.

        A layer that receives another number of tokens than the model was given (one of several
        sets of experts, another tower) gets the mask of the tokens of its kind, if that can be
        told.
        """
        if self.mask is None or self.length is None:
            return token_mask(self.mask, num_tokens)
        if num_tokens == self.mask.shape[0] * self.length:
            return token_mask(self.mask, num_tokens)
        if self.kinds is None or self.kinds.shape != self.mask.shape:
            return None
        text = self.kinds == 0
        chosen = [kind for kind in (text, ~text) if int(kind.sum()) == num_tokens]
        return self.mask[chosen[0]] != 0 if len(chosen) == 1 else None


class ForwardWatch:
    """Follows the forwards of a model and of its parts that take an ``attention_mask``.

    Experts see flattened tokens, so the mask must be taken where the model gets it. The innermost
    two-dimensional mask is the one the experts below belong to (encoder-decoder models have two);
    the outermost forward decides whether anything counts.
    """

    def __init__(self, model: nn.Module, inside: Iterable[str]) -> None:
        self._stack: list[Forward] = []
        self._handles: list[RemovableHandle] = []
        for module in _mask_takers(model, list(inside)):
            names = list(inspect.signature(module.forward).parameters)
            place = names.index("attention_mask") if "attention_mask" in names else None
            self._handles += [
                module.register_forward_pre_hook(self._entering(place), with_kwargs=True),
                module.register_forward_hook(self._leaving, always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def current(self, training: bool) -> Forward:
        """The running forward; outside of one, layers called by hand count while training."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward:  # gradient checkpointing runs the layer a second time
            return Forward(counts=False, mask=None)
        if self._stack:
            return self._stack[-1]
        return Forward(counts=training and torch.is_grad_enabled(), mask=None)

    def _entering(self, place: int | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if place is not None and place < len(args):
                mask = args[place]
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                inherits = bool(self._stack) and not _is_tower(module)
                mask = self._stack[-1].mask if inherits else None
            counts = (
                self._stack[-1].counts
                if self._stack
                else module.training and torch.is_grad_enabled()
            )
            self._stack.append(Forward(counts, mask, module, *_tokens_given(kwargs)))

        return enter

    def _leaving(self, module: nn.Module, args: object, output: object) -> None:
        # Called even if a hook before ours failed, so that we never entered.
        if self._stack and self._stack[-1].module is module:
            self._stack.pop()


def _mask_takers(model: nn.Module, inside: list[str]) -> list[nn.Module]:
    """The model, and the modules around the experts that take tokens and a mask of their own.

    Also the towers: to the patches of an image the mask of the text says nothing.
    """
    chosen = [model]
    for name, module in model.named_modules():
        around = any(layer.startswith(f"{name}.") for layer in inside)
        if name and around and (_takes_tokens(module) or _is_tower(module)):
            chosen.append(module)
    return chosen


def _takes_tokens(module: nn.Module) -> bool:
    """True for a part of a model that takes tokens and their mask."""
    return {"input_ids", "attention_mask"} <= _parameters(module)


def _is_tower(module: nn.Module) -> bool:
    """True for a part of a model that takes images or sound, and no tokens."""
    takes = _parameters(module)
    senses = {"pixel_values", "pixel_values_videos", "input_features"}
    return bool(takes & senses) and "input_ids" not in takes


def _tokens_given(kwargs: dict[str, Any]) -> tuple[int | None, Tensor | None]:
    """The length of the rows of a forward's input, and the kinds of its tokens."""
    tokens = [kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    lengths = [value.shape[1] for value in tokens if isinstance(value, Tensor) and value.dim() > 1]
    kinds = [
        value
        for name, value in kwargs.items()
        if name.endswith("token_type_ids") and isinstance(value, Tensor) and value.dim() == 2
    ]
    return (lengths[0] if lengths else None, kinds[0] if kinds else None)


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


class RoutingCounter:
    """Sums the routing weights of one layer over the micro-batches of an optimizer step."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._sums: Tensor | None = None
        self._tokens: Tensor | int = 0

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums, self._tokens = None, 0

    def resume(self, totals: Tensor) -> None:
        """Go on from what :meth:`totals` gave, float64 [N + 1]."""
        self._sums, self._tokens = totals[:-1], totals[-1]

    @torch.no_grad()
    def add(self, top_k_index: Tensor, top_k_weights: Tensor, mask: Tensor | None) -> None:
        """Count tokens; indices >= N are sentinels and weigh nothing.

        Args:
            top_k_index: int64 [T, K].
            top_k_weights: [T, K].
            mask: which tokens count, [T], or None for all.
        """
        weights = top_k_weights.detach().double()
        tokens: Tensor | int = top_k_index.shape[0]
        if mask is not None:
            weights = weights.masked_fill(~mask.unsqueeze(-1), 0.0)  # padding may hold NaN
            tokens = mask.sum()
        # index_add_ neither waits for the device, as bincount does, nor breaks deterministic mode
        sums = weights.new_zeros(self._num_experts + 1)
        sums.index_add_(
            0, top_k_index.clamp(max=self._num_experts).reshape(-1), weights.reshape(-1)
        )
        sums = sums[: self._num_experts]
        self._sums = sums if self._sums is None else self._sums + sums
        self._tokens = self._tokens + tokens

    def totals(self) -> NDArray[np.float64]:
        """Summed weights of each expert, then the number of counted tokens, float64 [N + 1]."""
        if self._sums is None:
            return np.zeros(self._num_experts + 1)
        tokens = torch.as_tensor(self._tokens, dtype=torch.float64, device=self._sums.device)
        totals: NDArray[np.float64] = torch.cat([self._sums, tokens.reshape(1)]).cpu().numpy()
        return totals


def token_mask(mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """Flatten an attention mask [batch, length] to the tokens of this forward, bool [T].

    With a key-value cache the mask is longer than the input, whose tokens are its last columns.
    None where the mask cannot belong to these tokens (image tokens of another tower, say).
    """
    if mask is None or mask.shape[0] == 0 or num_tokens % mask.shape[0]:
        return None
    length = num_tokens // mask.shape[0]
    if length > mask.shape[1]:
        return None
    return mask[:, mask.shape[1] - length :].reshape(-1) != 0
