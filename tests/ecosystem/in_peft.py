"""One table of models for the tests of exports: what PEFT makes of them, in this process.

Float64, so that equal functions agree to the last digits, wherever a model does not compute in
float32 on its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import drlora_torch
from tests.torch import helpers, models
from tests.torch.conformance import tiny
from tests.torch.conformance.table import FAMILIES
from tests.torch.conventions import families, handwritten


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One model."""

    build: Callable[[], Any]
    run: Callable[[Any], Tensor]
    layers: list[str] | None = None
    rounding: float = 1e-12
    context: Callable[[], Any] = contextlib.nullcontext

    def attach(self, **options: Any) -> drlora_torch.Adapter:
        """A fresh model with a fresh adapter."""
        model = self.build().eval()
        options = {"dtype": torch.float64, "layers": self.layers, **options}
        return helpers.attach(model, **options)

    def uneven(self, **options: Any) -> drlora_torch.Adapter:
        """An adapter whose experts differ in rank, with a trained-looking B."""
        adapter = self.attach(**options)
        helpers.uneven(adapter)
        return adapter

    @torch.no_grad()
    def outputs(self, model: Any) -> Tensor:
        """Logits, or what the model has in their place."""
        return self.run(model)

    def in_peft(self, directory: Path) -> Tensor:
        """Outputs of a fresh base model with the exported adapter, as PEFT loads it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patterns of parameters, see docs/ecosystem.md
            return self.outputs(peft.PeftModel.from_pretrained(self.build(), directory).eval())

    def distance(self, left: Tensor, right: Tensor) -> float:
        """Relative distance of outputs."""
        return float((left - right).norm() / right.norm())


def _convention(name: str) -> Case:
    family = families.CASES[name]
    return Case(
        build=lambda: families.build(name),
        run=lambda model: model(**families.batch(name)).logits,
        layers=family.patterns,
        rounding=family.rounding,
    )


def _table(name: str) -> Case:
    return Case(
        build=lambda: tiny.build(name, exact=True),
        run=lambda model: tiny.output(model, tiny.inputs(name)),
        context=tiny.Float64Throughout,
    )


def _by_hand(block: type[handwritten.Block]) -> Case:
    return Case(
        build=lambda: handwritten.Model(block),
        run=lambda model: model(models.tokens()),
    )


BY_HAND = {block.__name__: _by_hand(block) for block in (handwritten.Block, handwritten.DictBlock)}
CONVENTIONS = {name: _convention(name) for name in families.CASES} | BY_HAND
INTERFACE = {name: _table(name) for name in FAMILIES}
CASES = CONVENTIONS | INTERFACE
