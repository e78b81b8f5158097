"""Models whose experts are to be quantized: those of the table, and of the other conventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import drlora_torch
from tests.torch import helpers
from tests.torch.conformance import tiny
from tests.torch.conformance.table import FAMILIES
from tests.torch.conventions import families

FORMS = [
    {"quant_type": kind, "double_quant": double}
    for kind in ("nf4", "fp4")
    for double in (True, False)
]
Part = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model, and how it is run."""

    form: dict[str, Any]
    """How its experts are quantized; the cases take turns."""
    build: Callable[[], Any]
    """Build it in float32, the same at every call, in training mode."""
    output: Callable[[Any, int], Tensor]
    """Run a model on the inputs of a seed; random numbers are the same at every call."""
    locate: Callable[[Any, str, int], tuple[nn.Parameter, Part]]
    """The parameter that has an expert's weight, and its part that is that weight, [O, I]."""
    checkpoint: Callable[[Any, bool], None] | None
    """Switch gradient checkpointing on, reentrant or not; None where Transformers has none."""
    pretrained: Callable[[Any], Any]
    """The part that is a model of Transformers."""
    patterns: list[str] | None = None
    """The option ``layers``, for what is adapted on request only."""
    exact: bool = True
    """Whether all packed layers are adapted: others run as Transformers runs them, if unpacked."""

    def quantized(self) -> Any:
        model = self.build()
        drlora_torch.quantize_experts(model, **self.form)
        return model

    def attach(self, model: Any, **options: Any) -> drlora_torch.Adapter:
        return helpers.attach(model, layers=self.patterns, **options)

    def loss(self, model: Any, seed: int) -> Tensor:
        return tiny.loss(self.output(model, seed))

    def step(self, model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
        """Take a training step; the loss before it."""
        loss = self.loss(model, seed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, model: Any) -> Tensor:
        training = model.training
        found = self.output(model.eval(), 9)
        model.train(training)
        return found


def in_table(name: str) -> Case:
    """The case of a class with the experts interface; some inputs are padded."""

    def locate(module: Any, projection: str, expert: int) -> tuple[nn.Parameter, Part]:
        part: Part = lambda w: w[expert].T if module.is_transposed else w[expert]  # noqa: E731
        return getattr(module, projection), part

    def checkpoint(model: Any, reentrant: bool) -> None:
        helpers.checkpoint_activations(model, reentrant=reentrant)

    return Case(
        form=FORMS[list(FAMILIES).index(name) % len(FORMS)],
        build=lambda: tiny.build(name),
        output=lambda model, seed: tiny.output(
            model, tiny.inputs(name, seed, padded=seed % 2 == 1)
        ),
        locate=locate,
        checkpoint=checkpoint if FAMILIES[name].checkpoints else None,
        pretrained=lambda model: model,
    )


def of_convention(name: str) -> Case:
    """The case of a family beside the interface."""
    family = name.removesuffix("_both")
    patterns = families.CASES[family].patterns

    def output(model: Any, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found: Tensor = model(**families.batch(family, seed)).logits
        return found

    def checkpoint(model: Any, reentrant: bool) -> None:
        inner = model.model if family == "step3p7" else model
        helpers.checkpoint_activations(inner, reentrant=reentrant)

    return Case(
        form=FORMS[STACKED.index(name) % len(FORMS)],
        build=lambda: families.build(family, torch.float32),
        output=output,
        locate=families.CASES[family].locate,
        checkpoint=None if "jetmoe" in family else checkpoint,
        pretrained=lambda model: model.model if family == "step3p7" else model,
        patterns=["*.mlp", "*.self_attention.experts"] if name == "jetmoe_both" else patterns,
        exact=name not in ("jetmoe", "jetmoe_attention"),
    )


STACKED = [
    *("dbrx", "jetmoe", "jetmoe_attention", "jetmoe_both"),
    *("llama4", "longcat_flash", "step3p7"),
]
"""The conventions whose weights can be quantized; ``both`` are MLP and attention."""
