"""One run: paired by seed, inside its budget, repeatable, and without a trace in the base model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import drlora_torch
from benchmarks.quality import policies, profiling, rows, training
from benchmarks.quality.adapting import adapted
from benchmarks.quality.allocation import allocator_config
from benchmarks.quality.errors import StudyError
from benchmarks.quality.evaluation import evaluate
from benchmarks.quality.methods import METHODS
from benchmarks.quality.records import Method, RunRecord
from benchmarks.quality.rows import IGNORED, Row, collate, encode, shuffled
from benchmarks.quality.setting import Setting, load_setting
from benchmarks.quality.training import HUGE, rate, run
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.testing import make_request
from tests.marks import slow_and_thinned
from tests.quality.studies import TINY, make_spec

torch.set_num_threads(1)
SHORT = TINY.model_copy(update={"steps": 4, "events": 2, "evaluations": 1})
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setting() -> Setting:
    made = load_setting(make_spec())
    made.train = made.train[:64]  # the profile of static_profile reads them all
    return made


# -- pairing -------------------------------------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch, method: str, seed: int) -> list[Any]:
    """Tokens of the training batches of a run."""
    batches = []
    original = training.logits

    def watched(model: nn.Module, batch: rows.Batch) -> Any:
        batches.append(batch.tokens.tolist())
        return original(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "logits", watched)
        run(make_spec(method, seed=seed, training=SHORT))
    return batches


@pytest.mark.slow
def test_methods_of_a_seed_see_the_same_batches(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = seen(monkeypatch, "uniform", 0)
    assert len(first) == 4
    assert seen(monkeypatch, "drlora", 0) == first
    assert seen(monkeypatch, "uniform_peft", 0) == first
    assert seen(monkeypatch, "uniform", 1) != first


@pytest.mark.slow
def test_our_uniform_lora_is_pefts(setting: Setting) -> None:
    """The same rows of A, batches and optimizer: two libraries, one curve."""
    ours, theirs = run(make_spec("uniform")), run(make_spec("uniform_peft"))
    assert ours.curve[0][1] - ours.curve[-1][1] > 0.5  # something was learned
    assert [step for step, _ in ours.curve] == [step for step, _ in theirs.curve] == [0, 8, 16]
    np.testing.assert_allclose(
        [loss for _, loss in ours.curve], [loss for _, loss in theirs.curve], rtol=1e-4
    )
    assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-4)
    assert ours.ranks == theirs.ranks
    assert ours.trained_parameters == theirs.trained_parameters


def test_a_run_is_repeated_exactly_and_leaves_the_random_state(setting: Setting) -> None:
    state = torch.get_rng_state()
    first = run(make_spec("random", training=SHORT))
    torch.rand(3)
    second = run(make_spec("random", training=SHORT))
    same = {"seconds", "versions"}
    assert first.model_dump(exclude=same) == second.model_dump(exclude=same)
    torch.set_rng_state(state)
    run(make_spec("uniform_peft", training=SHORT))
    assert torch.equal(torch.get_rng_state(), state)


# -- every method --------------------------------------------------------------------------------


FAST = {"drlora", "peft_adalora", "sieve", "move"}
OTHER_BUDGETS = {"hellora"}
"""Fits a mean rank of 1 alone; tested with the sieve."""


@pytest.mark.parametrize(
    "name",
    [*sorted(FAST), *slow_and_thinned((n,) for n in METHODS if n not in FAST | OTHER_BUDGETS)],
)
def test_methods_keep_their_budget_and_the_base_model(name: str, setting: Setting) -> None:
    model = setting.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    method = METHODS[name]
    narrow = method.training.get("growth_end", 1.0) < 0.25
    if method.training.get("events", 0) > SHORT.events:
        fewer = {**method.training, "events": SHORT.events}
        method = method.model_copy(update={"training": fewer})
    enough = SHORT.model_copy(update={"steps": 20 if narrow else 8})  # for two events
    record = run(make_spec(method, training=enough))
    if name == "peft_adalora":
        assert record.refused is not None
        assert "TypeError: AdaLoraModel" in record.refused
    else:
        assert not record.diverged
        assert record.total_rank == (512 if name == "r_max_everywhere" else 128)
        assert record.test_loss < record.start_loss
        assert record.trained_parameters >= record.total_rank * (160 + 192 + 96 + 160)
    assert record.budget == 128
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [type(module) for module in model.modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def test_a_method_that_misses_its_budget_is_an_error(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lazy(request: Any) -> Any:
        return np.minimum(request.limits, [1] + [0] * (request.ranks.size - 1))

    monkeypatch.setattr(policies, "POLICIES", {"lazy": lazy})
    monkeypatch.setattr("benchmarks.quality.adapting.POLICIES", {"lazy": lazy})
    method = Method(name="lazy", policy="lazy")
    # 64 experts at rank 1 and 2 events of 1 unit in 4 layers
    with pytest.raises(StudyError, match=r"'lazy' ended at a total rank of 72, not 64 .* = 128"):
        run(make_spec(method=method, training=SHORT))


@pytest.mark.parametrize(
    ("name", "signal"), [("static_profile", "routing"), ("static_gradient", "gradient")]
)
def test_static_ranks_follow_what_was_measured_before_training(
    name: str, signal: str, setting: Setting
) -> None:
    method = METHODS[name]
    config = allocator_config(method, TINY, seed=0)
    measured = setting.profile(signal)
    with adapted(method, setting.model, config, 4.0, setting.profile) as subject:
        ranks = subject.ranks()
    for layer, values in measured.items():
        if signal == "routing":
            assert values.sum() == pytest.approx(1.0, abs=1e-6)  # weights of a token sum to 1
        assert ranks[layer].sum() == 32
        assert (np.diff(ranks[layer][np.argsort(values)]) >= 0).all()
        assert ranks[layer].max() > 2


def test_gradients_before_training_are_those_of_the_weights_in_random_directions(
    setting: Setting,
) -> None:
    """With B = 0, dL/dB of a dimension is s * (dL/dW) a for its row a of A."""
    model, rows_ = setting.model, setting.train[:8]
    found = profiling.gradient_profile(model, rows_, 8, setting.padding)
    rank = profiling.DIMENSIONS
    config = AllocatorConfig(r_init=rank, r_target=rank, r_max=rank, policy="uniform")
    adapter = drlora_torch.attach(model, AllocatorEngine(config), auto_step=False)
    starts = {name: layer.lora.tensors() for name, layer in adapter.layers.items()}
    drawn = {n: {k: t.detach().clone() for k, t in parts.items()} for n, parts in starts.items()}
    adapter.detach()
    weights = {name: model.get_submodule(name) for name in found}
    for experts in weights.values():
        experts.requires_grad_(True)
    try:
        batch = collate(rows_, setting.padding, torch.device("cpu"))
        torch.nn.functional.cross_entropy(*training.logits(model, batch)).backward()
        for name, experts in weights.items():
            expected = np.zeros(16)
            for projection in ("gate_up_proj", "down_proj"):
                A = drawn[name][f"{name}/{projection}/lora_A"]
                dW = getattr(experts, projection).grad  # [N, O, I]
                for expert in range(16):
                    own = A[expert * rank : (expert + 1) * rank]  # slots in the order of experts
                    expected[expert] += float((2.0 * dW[expert] @ own.T).abs().mean())
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-8)
    finally:
        for experts in weights.values():
            experts.requires_grad_(False)
            experts.zero_grad()


@pytest.mark.slow
def test_hindsight_has_the_ranks_of_early_growth_from_the_start(setting: Setting) -> None:
    enough = TINY.model_copy(update={"events": 2})
    grown = run(make_spec("early", training=enough))
    known = run(make_spec("hindsight", training=enough))
    assert known.ranks == grown.ranks
    assert len({rank for ranks in known.ranks.values() for rank in ranks}) > 1
    assert known.curve[0] == grown.curve[0]
    assert known.test_loss != grown.test_loss


@pytest.mark.slow
def test_statistics_are_of_the_layers(setting: Setting) -> None:
    record = run(make_spec("drlora"))
    assert list(record.ranks) == list(record.routing) == list(record.importance)
    assert all(sum(ranks) == 32 for ranks in record.ranks.values())
    assert all(sum(f) == pytest.approx(1.0, abs=5e-4) for f in record.routing.values())
    assert any(ranks != [2] * 16 for ranks in record.ranks.values())
    for name, ranks in record.ranks.items():
        effective = np.array(record.effective_ranks[name])
        assert (effective <= np.array(ranks) + 1e-3).all()
        assert effective.max() > 1.0


def test_a_run_that_diverges_has_finite_figures(setting: Setting) -> None:
    record = run(make_spec("uniform", learning_rate=1e30, training=SHORT))
    assert record.diverged
    assert record.test_loss == record.validation_loss == HUGE
    assert RunRecord.model_validate_json(record.model_dump_json()) == record


# -- rows and figures ----------------------------------------------------------------------------


class Words:
    """A tokenizer: one token per word, 1 to 9; 0 ends."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_the_loss_is_on_completions_only() -> None:
    few = [{"prompt": "1 2 3", "completion": "4 5"}, {"prompt": "6", "completion": "7"}]
    encoded = encode(Words(), few, max_tokens=8)
    batch = collate(encoded, padding=9, device=torch.device("cpu"))
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 0, 9, 9, 9]]
    assert batch.mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, no, 4, 5, 0, no], [7, 0, no, no, no, no]]
    assert batch.completion_tokens == sum(row.completion_tokens for row in encoded) == 5


def test_rows_are_cut_and_those_without_completion_left_out() -> None:
    few = [{"prompt": "1 2 3", "completion": "4 5"}, {"prompt": "1 2 3 4", "completion": "5"}]
    assert encode(Words(), few, max_tokens=4) == [Row((1, 2, 3, 4), 3)]
    with pytest.raises(StudyError, match="no completion of 2 rows begins within 3 tokens"):
        encode(Words(), few, max_tokens=3)


def test_batches_go_through_all_rows_before_any_comes_again() -> None:
    batches = shuffled(num_rows=10, size=4, seed=1)
    drawn = [number for _ in range(5) for number in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


class Copying(nn.Module):
    """Predicts that the last token comes again, with logit 5 against 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(5.0 * torch.eye(10))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": self.weight[input_ids]})


def test_figures_of_a_split() -> None:
    split = [Row((3, 3, 3), 1), Row((4, 4, 5), 1), Row((1, 2, 2, 2), 2)]
    right, wrong = (-torch.log_softmax(5.0 * torch.eye(10)[0], 0)[:2]).tolist()
    for size in (1, 2, 3):
        figures = evaluate(Copying(), split, size, padding=0)
        assert figures.loss == pytest.approx((5 * right + wrong) / 6, rel=1e-5)
        assert figures.exact_match == pytest.approx(2 / 3)


def test_the_linear_schedule() -> None:
    shared = TINY.model_copy(update={"steps": 100})
    rates = [rate(shared, step) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert 0.0 < rates[-1] < 0.02
    assert (np.diff(rates[4:]) < 0).all()
    slow = shared.model_copy(update={"schedule": "slow"})
    assert [rate(slow, step) for step in (1, 5, 25)] == pytest.approx([0.04, 0.2, 1.0])
    assert rate(slow, 100) == pytest.approx(1 / 76)
    constant = shared.model_copy(update={"schedule": "constant"})
    assert {rate(constant, step) for step in (1, 50, 100)} == {1.0}


@pytest.mark.slow
def test_accumulation_is_one_large_batch(setting: Setting) -> None:
    whole = TINY.model_copy(update={"steps": 4, "events": 2, "batch_size": 4})
    parts = whole.model_copy(update={"batch_size": 2, "accumulation": 2})
    once = run(make_spec("uniform", training=whole))
    twice = run(make_spec("uniform", training=parts))
    assert once.validation_loss == pytest.approx(twice.validation_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_smoke_profile(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quality", "run", "smoke", "--workers", "2"]
    output = tmp_path / "smoke.jsonl"
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "checked in every run" in done.stdout
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 6
    assert all(record["total_rank"] == record["budget"] == 128 for record in records)
    assert all(record["test_loss"] < record["start_loss"] - 0.5 for record in records)


@pytest.mark.parametrize(("name", "budget", "count"), [("sieve", 2, 4), ("hellora", 1, 2)])
def test_a_sieve_keeps_the_most_routed_experts(
    setting: Setting, name: str, budget: int, count: int
) -> None:
    training = TINY.model_copy(update={"r_target": budget})
    config = allocator_config(METHODS[name], training, seed=0)
    with adapted(METHODS[name], setting.model, config, 4.0, setting.profile) as subject:
        ranks = subject.ranks()
    for layer, routing in setting.profile("routing").items():
        chosen = np.argsort(-routing)[:count]
        assert ranks[layer][chosen].tolist() == [8] * count
        assert ranks[layer].sum() == 16 * budget


def test_probed_importance_stands_in_for_f_at_rank_0() -> None:
    policy = policies.probed([np.array([0.1, 3.0, 0.2, 1.0])])
    request = make_request(
        2, [1, 0, 0, 1], [1] * 4, routing=[1.0] * 4, importance=[0.2, 7.0, 7.0, 2.0], seed=(0, 0)
    )
    assert policy(request).tolist() == [0, 1, 0, 1]  # 3.0 * 2.2 / 1.1 and 2.0 / 2, not 0.4
