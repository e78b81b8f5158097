"""TRL's preference and reinforcement trainers with the base model of the adapter as reference."""

from __future__ import annotations

import doctest
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl as library
from datasets import Dataset
from torch import Tensor
from transformers import OlmoeForCausalLM
from trl import DPOConfig, DPOTrainer

import drlora_torch
from drlora_torch.integrations import trl
from drlora_torch.integrations.trainer import DRLoRACallback
from drlora_torch.integrations.trl import BaseReference, use_base_reference
from drlora_torch.step import agreement
from tests.ecosystem import trainers
from tests.ecosystem.test_trl import ARGUMENTS, TEXTS, VOCABULARY, tokenizer
from tests.marks import slow_and_thinned
from tests.torch import helpers, models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
PAIRS = {"prompt": TEXTS * 2, "chosen": [" yes"] * 16, "rejected": [" no, never"] * 16}
LABELLED = {
    "prompt": TEXTS * 2,
    "completion": [" yes", " no, never"] * 8,
    "label": [True, False] * 8,
}


def build(**changes: Any) -> Any:
    return models.build(vocab_size=VOCABULARY, **changes)


def attention() -> Any:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


class Spy(helpers.Spy):
    """What the engine is given, and the gradients at every optimizer step."""

    def __init__(self, adapter: drlora_torch.Adapter) -> None:
        super().__init__(adapter)
        self.gradients: list[list[Tensor]] = []

    def step(self) -> Any:
        parameters = self.adapter.parameters()
        self.gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        return super().step()


def same_runs(have: tuple[Any, Spy], want: tuple[Any, Spy]) -> None:
    """Losses and metrics, samples, gradients and ranks, bit for bit."""
    logs = []
    for trainer, _ in (have, want):
        rows = [r for r in trainer.state.log_history if "loss" in r]
        logs.append([{k: v for k, v in row.items() if "time" not in k} for row in rows])
    assert logs[0] == logs[1]
    ours, theirs = have[1], want[1]
    assert ours.adapter.events
    assert ours.adapter.skipped_steps == theirs.adapter.skipped_steps == 0
    assert helpers.rank_history(ours.adapter) == helpers.rank_history(theirs.adapter)
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    for sample, wanted in zip(ours.samples, theirs.samples, strict=True):
        for name, (phi, s, tokens) in wanted.items():
            assert tokens == sample[name][2]
            assert phi.tolist() == sample[name][0].tolist()
            assert s.tolist() == sample[name][1].tolist()


def prefer(
    folder: Path, own: bool, kind: str = "DPO", attach: dict[str, Any] | None = None, **changes: Any
) -> tuple[Any, Spy]:
    """Train with the adapter switched off as reference, or with a second model."""
    peft_config = changes.pop("peft_config", None)
    model = build()
    adapter = helpers.attach(model, **(attach or {}))
    spy = Spy(adapter)
    torch.manual_seed(0)  # PEFT's LoRA is drawn when the trainer is made
    values = {"gradient_checkpointing": False, **changes}
    trainer = getattr(library, f"{kind}Trainer")(
        model,
        ref_model=BaseReference(adapter) if own else build().eval(),
        args=getattr(library, f"{kind}Config")(
            str(folder), **{**ARGUMENTS, **trainers.renamed(values)}
        ),
        train_dataset=Dataset.from_dict(PAIRS if kind == "DPO" else LABELLED),
        processing_class=tokenizer(),
        callbacks=[DRLoRACallback(adapter)],
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, spy


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 6},
    "trained routers": {"attach": {"router": "trainable"}},
    "dropout": {"attach": {"dropout": 0.2}, "disable_dropout": False},
    "precomputed": {"precompute_ref_log_probs": True},
    "beside PEFT": {"peft_config": attention()},
    "kto": {"kind": "KTO"},
}


@pytest.mark.parametrize(
    "case",
    ["trained routers", *slow_and_thinned((case,) for case in CASES if case != "trained routers")],
)
def test_the_base_model_is_as_good_as_a_second_one(tmp_path: Path, case: str) -> None:
    changes = {"router_aux_loss_coef": 0.0, **CASES[case]}
    own = prefer(tmp_path / "own", True, **changes)
    same_runs(own, prefer(tmp_path / "second", False, **changes))
    assert list(own[0].ref_model.parameters()) == []
    assert own[0].model.training


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def reinforce(
    folder: Path, base: Path, own: bool, kind: str = "GRPO", **changes: Any
) -> tuple[Any, Spy]:
    model = OlmoeForCausalLM.from_pretrained(base).train()
    adapter = helpers.attach(model, router=changes.pop("router", "frozen"))
    spy = Spy(adapter)
    given = {k: v for k, v in ARGUMENTS.items() if k != "train_sampling_strategy"}
    values = {"gradient_checkpointing": False, "beta": 0.0 if own else 0.1, **changes}
    trainer = getattr(library, f"{kind}Trainer")(
        model=model,
        reward_funcs=reward,
        args=getattr(library, f"{kind}Config")(
            str(folder),
            num_generations=2,
            max_completion_length=6,
            router_aux_loss_coef=0.0,
            **given,
            **trainers.renamed(values),
        ),
        train_dataset=Dataset.from_dict({"prompt": TEXTS * 4}),
        processing_class=tokenizer(),
        callbacks=[DRLoRACallback(adapter)],
    )
    if own:
        use_base_reference(trainer, adapter, beta=0.1)
    trainer.train()
    return trainer, spy


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "GRPO"},
        {"kind": "GRPO", "gradient_checkpointing": True, "router": "trainable"},
        {"kind": "RLOO"},
    ],
    ids=["grpo", "grpo, checkpointing", "rloo"],
)
def test_reinforcement_without_a_second_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    build().save_pretrained(tmp_path / "base")
    own = reinforce(tmp_path / "own", tmp_path / "base", True, **changes)
    second = reinforce(tmp_path / "second", tmp_path / "base", False, **changes)
    assert any(row.get("kl") for row in own[0].state.log_history)
    same_runs(own, second)
    assert [len(list(t.ref_model.parameters())) > 0 for t, _ in (own, second)] == [False, True]
    assert own[0].args.beta == own[0].beta == 0.1


# -- the reference itself ----------------------------------------------------------------------


@pytest.mark.parametrize("router", ["frozen", "trainable"])
def test_it_is_the_base_model_and_leaves_no_trace(router: Any) -> None:
    """Log-probabilities are those of the base; nothing is counted; the policy stays as it was."""
    model = peft.get_peft_model(build(attention_dropout=0.3), attention())
    adapter = helpers.attach(model, router=router, dropout=0.2)
    helpers.uneven(adapter)
    with torch.no_grad():
        for parameter in [*adapter.router_parameters().values(), *model.parameters()]:
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.model.model.layers[0].eval()  # by the user
    reference = BaseReference(adapter)
    reference.to(torch.float16).eval().requires_grad_(False)
    training = {name: module.training for name, module in model.named_modules()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    ids = models.tokens()
    loss = model(input_ids=ids, labels=ids).loss
    torch.set_rng_state(state)
    logits = reference(input_ids=ids).logits
    assert torch.equal(torch.get_rng_state(), state)  # nothing is dropped in it
    assert torch.equal(logits, build().eval()(input_ids=ids).logits)
    assert not logits.requires_grad
    assert helpers.pending(adapter) == {}
    loss.backward()  # its forward was before
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(torch.equal(values[name], p) for name, p in model.named_parameters())
    sums = [v for name, v in helpers.pending(adapter).items() if "routing" in name]
    assert [int(total[-1]) for total in sums] == [ids.numel()] * 2


@pytest.mark.slow
def test_it_has_no_parameters_and_holds_no_second_model() -> None:
    def count() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.nn.Parameter)

    model = build()
    adapter = helpers.attach(model)
    before = count()
    reference = BaseReference(adapter)
    reference(input_ids=models.tokens())
    assert count() == before
    assert [list(reference.parameters()), list(reference.children())] == [[], []]
    state, base = reference.state_dict(), build().state_dict()
    assert state.keys() == base.keys()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    own = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert all(value.data_ptr() == own[name] for name, value in state.items())
    with pytest.raises(drlora_torch.AttachError, match="no weights of its own"):
        reference.load_state_dict(state)


class Trained:
    """What a GRPOTrainer is to ``use_base_reference``."""

    def __init__(self, beta: float, ref_model: Any = None) -> None:
        self.beta, self.ref_model = beta, ref_model


def test_wrong_uses_are_refused() -> None:
    adapter = helpers.attach(build())
    with pytest.raises(drlora_torch.AttachError, match=r"make it with beta=0\.0"):
        use_base_reference(Trained(0.1, torch.nn.Identity()), adapter, beta=0.1)
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        use_base_reference(Trained(0.0), adapter, beta=0)
    with pytest.raises(drlora_torch.AttachError, match="object has no beta"):
        use_base_reference(object(), adapter, beta=0.1)


def test_a_reference_that_is_to_follow_the_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(drlora_torch.AttachError, match="pass a second model as ref_model"):
        prefer(tmp_path, True, sync_ref_model=True)


@pytest.mark.slow
def test_a_reference_with_the_experts_left_on_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "the expert LoRA stays on in it; pass ref_model=BaseReference(adapter)"
    model = build()
    adapter = helpers.attach(model)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            str(tmp_path),
            **{**ARGUMENTS, "max_steps": 1},
            **trainers.renamed({"gradient_checkpointing": False}),
        ),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer(),
        callbacks=[DRLoRACallback(adapter)],
        peft_config=attention(),
    )
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        trainer.train()
    assert said in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        prefer(tmp_path, True, max_steps=1, peft_config=attention())
    assert said not in caplog.text


@pytest.mark.parametrize("module", [trl, agreement])
def test_the_examples_of_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0
