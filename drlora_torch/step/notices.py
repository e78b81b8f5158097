"""What is said once of a training that may not be what the user wants."""

from __future__ import annotations

import logging
import warnings
import weakref

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.options import RouterMode
from drlora_torch.step.processes import is_first_process

logger = logging.getLogger(__name__)
FOREIGN_STEPS = 20
_balancing: weakref.WeakSet[Attached] = weakref.WeakSet()
"""Adapters whose user was told of the balancing loss."""


def advise_against_balancing(attached: Attached, coefficient: float) -> None:
    """Say once for an adapter that the routers' balancing loss is on and cannot move them."""
    if attached.options.router is not RouterMode.FROZEN or not coefficient:
        return
    if attached in _balancing or not is_first_process():
        return
    _balancing.add(attached)
    logger.warning(
        "the routers are frozen, but their balancing loss is on (router_aux_loss_coef=%g): it "
        "cannot balance them and only distorts what the LoRA learns; switch it off "
        "(router_aux_loss_coef=0.0 in TRL's configs, config.output_router_logits = False in a loop "
        "of your own), or attach with router='trainable'",
        coefficient,
    )


class Notices:
    """Says each thing once for an adapter."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._waiting = 0  # optimizer steps of others while our statistics wait for one of ours

    def check_training(self, layer: AdaptedLayer) -> None:
        if not layer.experts.training and self._first("evaluation"):
            logger.warning(
                "the model is trained in evaluation mode (from_pretrained returns models in it): "
                "dropout is off; call model.train() before training if that is not intended"
            )
        frozen = not any(parameter.requires_grad for parameter in layer.lora.parameters())
        if frozen and self._first("frozen"):
            warnings.warn(
                "the expert LoRA is frozen and does not learn: something froze it after attach "
                "(get_peft_model does); call adapter.parameters() after that and before the "
                "optimizer is made, or give the Trainer a DRLoRACallback",
                RuntimeWarning,
                stacklevel=2,
            )

    def check_steps(self, *, ours: bool, waiting: bool) -> None:
        """Watch for a training whose optimizer does not hold the adapter.

        Args:
            ours: an optimizer steps that holds it.
            waiting: a backward pass has reached the experts since the last such step.
        """
        self._waiting = self._waiting + 1 if waiting and not ours else 0
        if self._waiting == FOREIGN_STEPS and self._first("foreign"):
            logger.warning(
                "%d optimizer steps since the last one that trains the expert LoRA, which has "
                "gradients: no optimizer may hold it; make the optimizer from "
                "adapter.parameters(), after attach and after get_peft_model",
                FOREIGN_STEPS,
            )

    def unaligned_mask(self, layer: str, num_tokens: int, shape: tuple[int, ...]) -> None:
        if self._first("mask"):
            warnings.warn(
                f"layer {layer!r} received {num_tokens} tokens, which the attention mask of shape "
                f"{list(shape)} cannot be aligned with, so padding counts in its routing; pass the "
                "mask [batch, length] of the tokens that the model is given",
                RuntimeWarning,
                stacklevel=2,
            )

    def _first(self, what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new
