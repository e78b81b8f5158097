"""What the configuration of a PEFT adapter says about its LoRA."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from drlora_core.validation import reword_errors
from drlora_torch.storage.peft.patterns import Patterns

Rank = Annotated[int, Field(ge=1, lt=2**31)]
LARGEST_ALPHA = 1e8  # in use are values up to some hundred; products of larger ones overflow
Alpha = Annotated[float, Field(ge=-LARGEST_ALPHA, le=LARGEST_ALPHA, allow_inf_nan=False)]


class PeftConfig(BaseModel):
    """The fields of PEFT's LoraConfig that an import depends on, of the kinds that PEFT writes."""

    model_config = ConfigDict(frozen=True, strict=True)

    peft_type: str
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None

    @model_validator(mode="after")
    def _read_patterns(self) -> Self:
        _ = self.ranks, self.alphas
        return self

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    @functools.cached_property
    def ranks(self) -> Patterns[int]:
        return Patterns(self.rank_pattern or {})

    @functools.cached_property
    def alphas(self) -> Patterns[float]:
        return Patterns(self.alpha_pattern or {})

    def scaling(self, target: str) -> float:
        """Scaling of a target: alpha / r, either of which a pattern may change."""
        rank, alpha = self.ranks.find(target) or self.r, self.alphas.find(target)
        alpha = self.lora_alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
