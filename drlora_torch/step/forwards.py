"""The forwards of a model that are running: which attention mask the tokens of a layer have.

Experts see flattened tokens, so the mask is taken where the model gets it. Nothing else is decided
here: whether a forward counts is decided by its backward pass.

Shape letters: T tokens of a layer.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drlora_torch.errors import AttachError, refuse_copy

REPLICA = (
    "DataParallel runs copies of the model, whose statistics would be lost (a Trainer uses it if "
    "one process sees several GPUs); start one process for each GPU (torchrun, accelerate launch) "
    "for DistributedDataParallel, or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
)
THREADS = (
    "two threads train one model at the same time: statistics and gradients of their batches would "
    "be mixed, and weights would move below a running backward pass; train in one thread, and let "
    "others evaluate or generate under torch.no_grad()"
)
SENSES = {"pixel_values", "pixel_values_videos", "input_features"}


@dataclasses.dataclass(slots=True, eq=False)
class ModelCall:
    """One forward of the model, or of a part of it that takes a mask."""

    mask: Tensor | None  # [batch, length]
    length: int | None = None
    """Tokens in each row of the input, where the forward was given any."""
    kinds: Tensor | None = None
    """What each token is (text or image), where the model tells its layers, [batch, length]."""
    module: int = 0
    """Identity of the module that runs: a reference would keep a model alive with its loss."""
    with_gradients: bool = True
    asked: bool = False
    """True once its first adapted layer has run."""
    reached: bool = False
    """True once its backward pass has begun."""
    outer: ModelCall | None = None
    checkpointed: dict[str, int] = dataclasses.field(default_factory=dict)
    """Layers that ran without gradients inside, as reentrant checkpointing does: the numbers of
    those forwards by layer."""

    def token_mask(self, num_tokens: int) -> tuple[Tensor, Tensor | None] | None:
        """Which of the tokens that a layer received count, bool [T].

        A layer that received another number of tokens than the model was given (one of several
        sets of experts, another tower) gets the mask of the tokens of its kind, where it is known.

        Returns:
            The mask, and whether it can be aligned with the tokens, bool [] on its device, where
            only that can tell; all tokens count if not. None where the mask cannot be aligned, or
            there is none.
        """
        if self.mask is None:
            return None
        if self.length is None or num_tokens == self.mask.shape[0] * self.length:
            mask = flatten_mask(self.mask, num_tokens)
            return None if mask is None else (mask, None)
        if self.kinds is None or self.kinds.shape != self.mask.shape:
            return None
        if num_tokens > self.mask.numel():
            return None
        return _mask_of_kind(self.mask, self.kinds == 0, num_tokens)


def _mask_of_kind(mask: Tensor, text: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The mask of the text tokens, or of the others: of those that are so many, in their order."""
    num_text = text.sum()
    is_text, is_other = num_text == num_tokens, text.numel() - num_text == num_tokens
    chosen = torch.where(is_text, text, ~text).reshape(-1)
    # a sort, where picking by a mask would wait to know how many tokens it picks
    places = torch.sort(chosen, descending=True, stable=True).indices[:num_tokens]
    aligned = is_text ^ is_other
    return (mask.reshape(-1)[places] != 0) | ~aligned, aligned


class ForwardWatch:
    """Knows the running forward of each thread, and the one whose backward pass is running.

    The innermost two-dimensional mask is the one that the experts below belong to (encoder-decoder
    models have two). A forward of the whole model starts afresh, so one that was interrupted
    without its end being seen (KeyboardInterrupt) leaves nothing behind.
    """

    __reduce__ = refuse_copy

    def __init__(
        self, model: nn.Module, layers: Iterable[str], backward_begins: Callable[[], None]
    ) -> None:
        self._model = model
        self._backward_begins = weakref.WeakMethod(backward_begins)
        self._running = threading.local()
        self._in_backward: ModelCall | None = None
        self._trainer: threading.Thread | None = None  # in a forward of the model that may train
        self._handles: list[RemovableHandle] = []
        for module, arguments in _mask_takers(model, list(layers)):
            self._handles += [
                module.register_forward_pre_hook(self._entering(arguments), with_kwargs=True),
                module.register_forward_hook(self._leaving, always_call=True),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def running(self) -> ModelCall | None:
        """The forward of this thread; None outside of one."""
        return getattr(self._running, "call", None)

    @property
    def of_layer(self) -> ModelCall | None:
        """The running forward, or the one that a checkpointed layer is run again for."""
        return self._in_backward if self.running is None else self.running

    def begins_training(self) -> bool:
        """True once in each forward that may be trained: at the first layer that asks."""
        if (call := self.running) is None:
            return torch.is_grad_enabled()
        first, call.asked = call.with_gradients and not call.asked, True
        return first

    def checkpointed_call(self, layer: str) -> ModelCall | None:
        """The forward that a checkpointed layer is run again for, within its backward pass."""
        call = self._in_backward
        return call if call is not None and layer in call.checkpointed else None

    def _entering(self, arguments: list[str]) -> Callable[..., None]:
        place = arguments.index("attention_mask") if "attention_mask" in arguments else None
        tower = _is_tower(arguments)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if getattr(module, "_is_replica", False):
                raise AttachError(REPLICA)
            outer = None if module is self._model else self.running
            grads = torch.is_grad_enabled()
            if outer is None and grads:
                self._in_backward = None  # its backward pass is over
            if grads and module is self._model and module.training:
                self._check_thread()
            mask = kwargs.get("attention_mask")
            if place is not None and place < len(args):
                mask = args[place]
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                # A decoder that is given an encoder's output has tokens of its own.
                own = tower or kwargs.get("encoder_hidden_states") is not None
                mask = None if outer is None or own else outer.mask
            length, kinds = _tokens_given(kwargs)
            self._running.call = ModelCall(mask, length, kinds, id(module), grads, outer=outer)

        return enter

    def _check_thread(self) -> None:
        """Refuse a forward in training beside one of another thread."""
        if torch.compiler.is_compiling():
            return  # a graph cannot ask for its thread
        own, other = threading.current_thread(), self._trainer
        if other is not None and other is not own and other.is_alive():
            raise AttachError(THREADS)
        self._trainer = own

    def _leave_thread(self) -> None:
        if self._trainer is threading.current_thread():
            self._trainer = None

    def _leaving(self, module: nn.Module, args: object, output: object) -> None:
        call = self.running
        if call is None or call.module != id(module):  # a hook before ours failed: never entered
            return
        self._running.call = call.outer
        if torch.compiler.is_compiling() and not call.checkpointed:
            return  # the graph has the mask itself
        if self._trainer is not None and module is self._model:
            self._leave_thread()
        watch = weakref.ref(self)

        def reached(gradient: Tensor) -> None:
            """The backward pass enters the forward through its output, before any of its layers.

            Those then run, and are passed through, in backward passes of their own inside of it.
            """
            if (alive := watch()) is not None:
                alive._in_backward = call
                if call.checkpointed and (begins := alive._backward_begins()) is not None:
                    begins()

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(reached)  # type: ignore[no-untyped-call]


def flatten_mask(mask: Tensor, num_tokens: int) -> Tensor | None:
    """Flatten an attention mask [batch, length] to the tokens of a layer, bool [T].

    With a key-value cache the mask is longer than the input, whose tokens are its last columns.
    None where the mask cannot belong to so many tokens.
    """
    if mask.shape[0] == 0 or num_tokens % mask.shape[0]:
        return None
    length = num_tokens // mask.shape[0]
    if length > mask.shape[1]:
        return None
    return mask[:, mask.shape[1] - length :].reshape(-1) != 0


def _mask_takers(model: nn.Module, layers: list[str]) -> Iterator[tuple[nn.Module, list[str]]]:
    """The model, and the modules around the layers that take tokens and a mask of their own.

    Also the towers: the mask of a text says nothing of the patches of an image. Each comes with the
    names of its arguments.
    """
    for name, module in model.named_modules():
        if not name or any(layer.startswith(f"{name}.") for layer in layers):
            arguments = list(inspect.signature(module.forward).parameters)
            takes_tokens = {"input_ids", "attention_mask"} <= set(arguments)
            if not name or takes_tokens or _is_tower(arguments):
                yield module, arguments


def _is_tower(arguments: list[str]) -> bool:
    """True for a part of a model that takes images or sound, and no tokens."""
    return not SENSES.isdisjoint(arguments) and "input_ids" not in arguments


def _tokens_given(kwargs: dict[str, Any]) -> tuple[int | None, Tensor | None]:
    """The length of the rows of a forward's input, and the kinds of its tokens."""
    given = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.dim() > 1}
    lengths = [given[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in given]
    kinds = [v for k, v in given.items() if k.endswith("token_type_ids") and v.dim() == 2]
    return next(iter(lengths), None), next(iter(kinds), None)


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors that a forward returned, in tuples, lists and dicts of any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, tuple, list)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
