"""TRL's preference and reinforcement trainers with the adapted model as its own reference.

They compare the trained model with the one before training. For a model without PEFT they load that
a second time. The base model is still there under the adapter, so nothing has to be loaded.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.wrappers import without_peft

_known: weakref.WeakSet[Attached] = weakref.WeakSet()


class BaseReference(nn.Module):
    """The base model of an adapter, as ``ref_model`` of TRL's DPOTrainer and KTOTrainer.

    It has no parameters: it runs the trained model with the adapter and PEFT's adapters switched
    off, without gradients and in evaluation mode. Nothing is counted, and moving, freezing or
    preparing it does not touch the trained model.

    Args:
        adapter: the adapter that is trained.

    Raises:
        AttachError: in its forward, if another adapter is the active one.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> from drlora_core import AllocatorConfig, AllocatorEngine
        >>> import drlora_torch
        >>> model = OlmoeForCausalLM(OlmoeConfig(hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        ...     num_experts_per_tok=2, vocab_size=16))
        >>> engine = AllocatorEngine(AllocatorConfig(r_init=2, r_target=4))
        >>> reference = BaseReference(drlora_torch.attach(model, engine))
        >>> reference(input_ids=torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 2, 16])

    With a Trainer::

        trainer = DPOTrainer(model, ref_model=BaseReference(adapter), args=args, ...)
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self._adapter = adapter  # no Module, so the model does not become a part of this one
        _known.add(state_of(adapter))

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self._adapter.model.config

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model.

        TRL replaces the ``forward`` of its models; here that of the trained model is to run, which
        it has replaced in the same way.
        """
        with torch.no_grad(), _base_model(self._adapter) as model:
            return model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model; the same as a call."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors of the base model; not copies.

        TRL hashes them, to know the log-probabilities that it has computed for this model before.
        """
        with _base_model(self._adapter) as model:
            ours = [n for n, module in model.named_modules() if isinstance(module, ExpertLoRA)]
            prefixes = tuple(f"{name}." for name in ours)
            found = model.state_dict(*args, **kwargs)
            return {name: value for name, value in found.items() if not name.startswith(prefixes)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Refused: the weights are those of the trained model."""
        raise AttachError("a BaseReference has no weights of its own; load the model's")


def use_base_reference(trainer: Any, adapter: Adapter, beta: float) -> None:
    """Let a GRPOTrainer or RLOOTrainer compare with the base model, at the memory of one model.

    These trainers have no argument for the reference: with ``beta`` above 0 they load the model a
    second time while they are made. So make them with ``beta=0.0`` and set it here.

    Args:
        trainer: made with ``beta=0.0``.
        adapter: the adapter that is trained.
        beta: weight of the divergence from the base model, above 0.

    Raises:
        AttachError: the trainer has a reference model already, or knows none.
        ValueError: ``beta`` is not above 0.

    Example::

        args = GRPOConfig(beta=0.0, ...)
        trainer = GRPOTrainer(model, reward, args=args, callbacks=[DRLoRACallback(adapter)], ...)
        use_base_reference(trainer, adapter, beta=0.04)
        trainer.train()
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta!r}")
    for name in ("beta", "ref_model"):
        if not hasattr(trainer, name):
            raise AttachError(f"{type(trainer).__name__} has no {name}: it uses no reference model")
    if trainer.beta or trainer.ref_model is not None:
        raise AttachError(
            f"{type(trainer).__name__} was made with beta={trainer.beta} and may have loaded a "
            "reference model of its own; make it with beta=0.0"
        )
    trainer.beta = trainer.args.beta = beta
    trainer.ref_model = BaseReference(adapter)


def has_reference(adapter: Adapter) -> bool:
    """True if a reference was made for an adapter."""
    return state_of(adapter) in _known


@contextlib.contextmanager
def _base_model(adapter: Adapter) -> Iterator[nn.Module]:
    """The base model in evaluation mode; afterwards everything is as before."""
    model = adapter.model
    training = [module for module in model.modules() if module.training]
    with adapter.disabled(), without_peft(model):
        for module in training:
            module.training = False
        try:
            yield model
        finally:
            for module in training:
                module.training = True
