"""What a Trainer's callback makes sure of before and when training begins."""

from __future__ import annotations

import logging
from typing import Any

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import AttachError
from drlora_torch.integrations.trl import has_reference
from drlora_torch.models import frameworks
from drlora_torch.models.balancing import active_coefficient, declared_coefficient
from drlora_torch.models.wrappers import is_peft_model
from drlora_torch.step.notices import advise_against_balancing
from drlora_torch.step.processes import is_first_process

logger = logging.getLogger(__name__)


def unfreeze(adapter: Adapter) -> None:
    """Let the adapter learn if something froze it, while the Trainer has no optimizer yet.

    A Trainer that is given ``peft_config`` calls ``get_peft_model`` itself, after ``attach``.
    """
    frozen = adapter.is_active and not all(p.requires_grad for p in adapter.lora_parameters())
    adapter.parameters()
    if frozen and state_of(adapter).trainable and is_first_process():
        logger.warning(
            "the expert LoRA was frozen after attach (get_peft_model freezes all that is not "
            "PEFT's); it requires gradients again and is trained"
        )


def check_optimizer(adapter: Adapter, optimizer: Any) -> None:
    """Refuse to train with an optimizer that does not hold the adapter.

    Raises:
        AttachError: parameters of the adapter are missing in it, or it is one of DeepSpeed's.
    """
    state = state_of(adapter)
    if state.trainable:
        frameworks.check_optimizer(optimizer)
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or not state.trainable or not adapter.options.auto_step:
        return
    held = {id(parameter) for group in groups for parameter in group["params"]}
    wanted = adapter.parameters()
    missing = sum(id(parameter) not in held for parameter in wanted)
    if missing:
        raise AttachError(
            f"the Trainer's optimizer lacks {missing} of the adapter's {len(wanted)} parameters, "
            "which would not be trained: it was made before attach, or while they were frozen "
            "(get_peft_model freezes them). Right:\n"
            "    adapter = drlora_torch.attach(model, engine)\n"
            "    trainer = Trainer(model, ..., callbacks=[DRLoRACallback(adapter)])\n"
            "and an optimizer of your own is made from adapter.parameters() after that"
        )


def check_losses(adapter: Adapter, args: Any, model: Any) -> None:
    """Say what TRL adds to the loss, or takes for its reference, that nobody may want.

    Raises:
        AttachError: the reference that was made for the adapter cannot do what is asked of it.
    """
    coefficient = active_coefficient(adapter.model)
    declared = declared_coefficient(adapter.model)
    if hasattr(args, "router_aux_loss_coef") and declared is not None:
        given = args.router_aux_loss_coef
        coefficient = declared if given is None else given  # as TRL reads them
    advise_against_balancing(state_of(adapter), coefficient)
    if getattr(args, "sync_ref_model", False) and has_reference(adapter):
        raise AttachError(
            "sync_ref_model=True copies the trained weights into the reference, and a "
            "BaseReference has none; pass a second model as ref_model"
        )
    refers = hasattr(args, "sync_ref_model") and bool(getattr(args, "beta", 0.0))
    if refers and is_peft_model(model) and not has_reference(adapter) and is_first_process():
        logger.warning(
            "without a ref_model, TRL makes its reference by switching PEFT's adapters off, and "
            "the expert LoRA stays on in it; pass ref_model=BaseReference(adapter) or call "
            "use_base_reference (drlora_torch.integrations.trl)"
        )
