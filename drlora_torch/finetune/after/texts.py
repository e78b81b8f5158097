"""Generate texts, reproducibly and without a trace in the generators of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from drlora_core.validation import reword_errors


class Sampling(BaseModel):
    """How the next token is chosen, and how many are.

    Raises:
        pydantic.ValidationError: a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(default=128, ge=1)
    """Longest text."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw among the likeliest tokens that have this probability together."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of each text; None: every text is drawn anew."""

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if 0.0 < self.temperature < 0.01:
            raise ValueError(f"temperature must be 0 or at least 0.01, got {self.temperature}")
        if self.top_p < 1.0 and not self.temperature:
            raise ValueError("top_p needs a temperature above 0")
        return self

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    def config(self, stop: Sequence[int], pad: int) -> GenerationConfig:
        """Return it as Transformers takes it.

        Args:
            stop: tokens that end a text.
            pad: token that fills up shorter texts.
        """
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            num_beams=1,
            eos_token_id=list(stop) or None,
            pad_token_id=pad,
            **(drawn if self.temperature else {}),
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Sequence[int],
    streamer: Any = None,
) -> list[str]:
    """Return the text that follows each prompt, without special tokens.

    Args:
        model: of Transformers.
        tokenizer: of the model.
        prompts: their tokens.
        sampling: how to choose.
        stop: tokens that end a text.
        streamer: of Transformers, which gets the tokens of a single prompt as they are made.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    seen = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    with torch.no_grad(), _seeded(sampling.seed):
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=seen.to(model.device),
            generation_config=sampling.config(stop, pad),
            streamer=streamer,
        )
    new = made[:, ids.shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new.tolist()]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed the generators inside, and bring them back to where they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
