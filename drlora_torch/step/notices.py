"""What is said once of a training that may not be what the user wants."""

from __future__ import annotations

import logging
import warnings
import weakref

from torch import nn

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.quantization.owners import foreign_method
from drlora_torch.models.records import describe_storage
from drlora_torch.models.wrappers import is_adapted_by_peft
from drlora_torch.options import Newborn, RouterMode
from drlora_torch.step.newborn import find_obstacle
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.step.processes import is_first_process

logger = logging.getLogger(__name__)
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


def tell_storage(attached: Attached) -> None:
    """Say how the experts are stored; loudly if a quantized model has experts that are not."""
    if not is_first_process():
        return
    method = foreign_method(attached.model)
    storage = describe_storage(layer.record for layer in attached.layers.values())
    if method is None or any(_is_packed(layer) for layer in attached.layers.values()):
        logger.info("%d layers, %s", len(attached.layers), storage)
        return
    logger.warning(
        "the model is quantized (%s), but its experts are not: %s; "
        "drlora_torch.quantize_experts(model) before attach packs them into 4 bits, and "
        "quantization_config=drlora_torch.Experts4bitConfig(...) does it while loading",
        method,
        storage,
    )


def _is_packed(layer: AdaptedLayer) -> bool:
    return convention_of(layer.experts).is_packed(layer.experts)


def _is_in_peft(model: nn.Module) -> bool:
    return is_adapted_by_peft(model) and not getattr(model, "_hf_peft_config_loaded", False)


class Notices:
    """Says each thing once for an adapter."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def check_training(self, layer: AdaptedLayer) -> None:
        if not layer.experts.training and self._first("evaluation"):
            logger.warning(
                "the model is trained in evaluation mode (from_pretrained returns models in it): "
                "dropout is off; call model.train() before training if that is not intended"
            )
        frozen = not any(parameter.requires_grad for parameter in layer.lora.matrices())
        if frozen and self._first("frozen"):
            warnings.warn(
                "the expert LoRA is frozen and does not learn: something froze it after attach "
                "(get_peft_model does); call adapter.parameters() after that and before the "
                "optimizer is made, or give the Trainer a DRLoRACallback",
                RuntimeWarning,
                stacklevel=2,
            )

    def no_gradients(self) -> None:
        """Say that a backward pass came by and went elsewhere."""
        if self._first("no gradients"):
            logger.warning(
                "a backward pass has reached the experts and left no gradient on the LoRA, so this "
                "step trains nothing of it: was the model run with copies of its parameters "
                "(torch.func.functional_call), or are the gradients taken by torch.autograd.grad?"
            )

    def check_reached(self, attached: Attached) -> None:
        """Name Linears that the first step trains nothing of: their LoRA may never be used."""
        if not self._first("reached"):
            return
        idle = [
            name
            for name, each in attached.dense.items()
            if each.lora.lora_B.requires_grad and each.lora.lora_B.grad is None
        ]
        if idle and is_first_process():
            logger.warning(
                "%d of %d Linears that attention_rank adapts got no gradient in the first step "
                "(%s): either this batch did not use them, or the model reads their weights "
                "without calling them, and their LoRA does nothing; attention_targets= leaves them "
                "out",
                len(idle),
                len(attached.dense),
                idle[0],
            )

    def check_saving(self, attached: Attached) -> None:
        """Name the one model that would be saved without the adapter."""
        if self._first("saving") and not attached.saved_by_peft and _is_in_peft(attached.model):
            logger.warning(
                "PEFT has put its own adapter into the model after attach: a PeftModel saves and "
                "loads that one alone; call adapter.save_pretrained too, give the Trainer a "
                "DRLoRACallback(adapter), or attach to the PeftModel"
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

    def uncorrected(self, attached: Attached) -> None:
        """Name optimizers under which newborn rows are left alone though the user did not ask."""
        grew = any((delta > 0).any() for delta in attached.events[-1].deltas.values())
        if attached.options.newborn is not Newborn.CORRECTED or not grew:
            return
        parameters = lora_parameters(attached)
        for optimizer in attached.optimizers:
            obstacle, name = find_obstacle(optimizer, parameters), type(optimizer).__name__
            if obstacle is not None and self._first(f"uncorrected {name}"):
                logger.warning(
                    "the first steps of newborn rank dimensions are not corrected under %s: %s; "
                    "newborn='plain' says that this is meant",
                    name,
                    obstacle,
                )

    def silence(self, what: str) -> None:
        """Say nothing of a thing, such as ``evaluation``: it is meant."""
        self._said.add(what)

    def _first(self, what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new
