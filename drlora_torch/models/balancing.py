"""The loss by which a model balances its routers, as its config declares it."""

from __future__ import annotations

from typing import Any

from torch import nn


def declared_coefficient(model: nn.Module) -> float | None:
    """Weight of the balancing loss that the model can return; None if it has no such loss."""
    config = _text_config(model)
    if not hasattr(config, "output_router_logits"):
        return None
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def active_coefficient(model: nn.Module) -> float:
    """Weight with which the model adds the balancing loss to its loss; 0 if it does not."""
    active = getattr(_text_config(model), "output_router_logits", False)
    return (declared_coefficient(model) or 0.0) if active else 0.0


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
