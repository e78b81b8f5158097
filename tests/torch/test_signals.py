"""Named signals and callables of the user's own, against slow loops over experts and tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drlora_torch
from drlora_core import StatisticError
from drlora_torch import signals
from drlora_torch.signals import Importance, ProjectionRows, Routing
from drlora_torch.step import samples
from tests.torch import helpers, models
from tests.torch.helpers import RouterLog, Spy

ROUNDING = {"rtol": 3e-6, "atol": 1e-12}
MASKS = [torch.ones(3, 7), torch.ones(3, 7)]
MASKS[1][0, :3] = 0


def of_row(name: str, row: Tensor, gradient: Tensor) -> float:
    """One vector's part of an importance signal, in plain Python."""
    values, slopes = row.double().tolist(), gradient.double().tolist()
    pairs = list(zip(values, slopes, strict=True))
    if name == "fisher":
        return sum(slope * slope for slope in slopes) / len(slopes)
    if name == "gradient":
        return sum(abs(slope) for slope in slopes) / len(slopes)
    if name == "update_norm":
        return float(sum(value * value for value in values) ** 0.5)
    return sum(abs(value * slope) for value, slope in pairs) / len(pairs)


def slow_importance(name: str, adapter: drlora_torch.Adapter) -> dict[str, np.ndarray]:
    """s_j of every expert and rank dimension [N, R], before any division by phi."""
    found = {}
    for layer, adapted in adapter.layers.items():
        table = adapted.lora.table
        found[layer] = np.zeros((table.num_experts, table.r_max))
        for expert in range(table.num_experts):
            for dimension, slot in enumerate(helpers.owned(adapted.lora, expert)):
                for _, slots in adapted.lora.items():
                    a, b = (
                        of_row(name, parameter.detach()[slot], parameter.grad[slot])  # type: ignore[index]
                        for parameter in (slots.lora_A, slots.lora_B)
                    )
                    found[layer][expert, dimension] += a * b if name == "update_norm" else a + b
    return found


def slow_phi(name: str, calls: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    sums, tokens = np.zeros(models.EXPERTS), 0
    for (index, weights), mask in zip(calls, MASKS, strict=True):
        for token, keep in enumerate(mask.reshape(-1).tolist()):
            tokens += int(keep)
            own = weights[token].double().tolist()
            for expert, weight in zip(index[token].tolist(), own, strict=True):
                counts = {"weight": weight, "margin": weight - min(own), "count": 1.0}
                sums[expert] += counts[name] * keep
    return sums / tokens


def compare(importance: Any = "sensitivity", routing: Any = "weight", **options: Any) -> None:
    """A step of two micro-batches, one of them padded, against the loops."""
    model = models.build()
    given = {"importance": importance, "routing": routing}
    adapter = helpers.attach(model, config={"growth_end": 200}, **given, **options)
    helpers.uneven(adapter)
    log, spy, optimizer = RouterLog(adapter), Spy(adapter), helpers.adamw(adapter)
    for seed, mask in enumerate(MASKS):
        model(**helpers.batch(seed), attention_mask=mask.long()).loss.backward()
    chosen = adapter.options.importance.name
    expected = slow_importance(chosen, adapter)
    optimizer.step()
    optimizer.zero_grad()
    if not adapter.options.auto_step:
        adapter.step()
    for name, (phi, s, tokens) in spy.samples[0].items():
        wanted = slow_phi(adapter.options.routing.name, log.calls[name])
        np.testing.assert_allclose(phi, wanted, rtol=1e-6, atol=1e-12)
        if chosen == "sensitivity_per_token":
            for expert, share in enumerate(wanted.tolist()):
                expected[name][expert] *= 1 / share if share else 0.0
        np.testing.assert_allclose(s, expected[name], **ROUNDING)
        assert (tokens, s.any(), phi.any()) == (39, True, True)


@pytest.mark.parametrize("auto_step", [True, False])
@pytest.mark.parametrize("name", signals.IMPORTANCE)
def test_importance_signals(name: str, auto_step: bool) -> None:
    compare(importance=name, auto_step=auto_step)


@pytest.mark.parametrize(("name", "layout"), [("weight", "masked"), ("margin", "pooled"),
                                              ("count", "masked")])  # fmt: skip
def test_routing_signals(name: str, layout: str) -> None:
    compare(routing=name, importance="sensitivity_per_token", layout=layout)


BROKEN = {
    "fisher of a mean": (
        "fisher",
        lambda rows: rows.grad_A.mean(1) ** 2 + rows.grad_B.mean(1) ** 2,
    ),
    "gradient of B alone": ("gradient", lambda rows: rows.grad_B.abs().mean(1)),
    "gradient without signs": ("gradient", lambda rows: (rows.grad_A.mean(1) + 1).abs()),
    "norm of B alone": ("update_norm", lambda rows: rows.B.norm(dim=1)),
    "sum of norms": ("update_norm", lambda rows: rows.A.norm(dim=1) + rows.B.norm(dim=1)),
    "margin to the largest": ("margin", lambda w: w.amax(1, keepdim=True) - w),
    "margin to the mean": ("margin", lambda w: (w - w.mean(1, keepdim=True)).clamp(min=0)),
    "count of weights": ("count", lambda w: w),
    "count of large ones": ("count", lambda w: (w > w.mean()).double()),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_signals_are_found(what: str) -> None:
    name, function = BROKEN[what]
    kind: Any = Routing if name in signals.ROUTING else Importance
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(**{kind.kind: kind(name, function)})


def test_a_missing_division_by_phi_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_per_token", lambda importance, phi: importance)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(importance="sensitivity_per_token")


def test_the_defaults_are_the_fast_code_bit_for_bit() -> None:
    """The plain function ``sensitivity`` is another way to the same numbers, up to rounding."""
    given = []
    for options in ({}, {"importance": signals.sensitivity, "routing": signals.weight}):
        model = models.build()
        adapter = helpers.attach(model, **options)
        spy, optimizer = Spy(adapter), helpers.adamw(adapter)
        for seed in range(6):
            helpers.step(model, optimizer, seed)
        given.append(repr((spy.samples, helpers.rank_history(adapter))))
        assert str(adapter.options.importance) == "sensitivity"
    assert given[0] == given[1]
    rows = ProjectionRows(*(torch.randn(5, 8) for _ in range(4)))
    assert signals.sensitivity_per_token(rows).equal(signals.sensitivity(rows))


def own_importance(rows: ProjectionRows) -> Tensor:
    return rows.grad_B.abs().amax(dim=1)


def own_routing(weights: Tensor) -> Tensor:
    return weights**2


def test_callables_of_the_users_own() -> None:
    model = models.build()
    power = functools.partial(torch.pow, exponent=2)
    adapter = helpers.attach(model, importance=own_importance, routing=power)
    spy, log = Spy(adapter), RouterLog(adapter)
    model(**helpers.batch()).loss.backward()
    expected = {
        name: sum(slots.lora_B.grad.abs().amax(dim=1).double() for _, slots in layer.lora.items())
        for name, layer in adapter.layers.items()
    }
    helpers.adamw(adapter).step()
    for name, (phi, s, _) in spy.samples[0].items():
        table = adapter.layers[name].lora.table
        np.testing.assert_allclose(s, table.per_dimension(expected[name].numpy()), rtol=1e-6)
        (index, weights), *_ = log.calls[name]
        sums = np.bincount(index.reshape(-1), weights.double().reshape(-1) ** 2, models.EXPERTS)
        np.testing.assert_allclose(phi, sums / 21, rtol=1e-6)
    assert str(adapter.options.importance) == "own:own_importance"


WRONG = [
    ("importance", lambda rows: rows.A.mean(), "returned shape [] on cpu, not [32] on cpu"),
    ("importance", lambda rows: rows.A[:3, 0], "returned shape [3] on cpu, not [32] on cpu"),
    ("importance", lambda rows: rows.A.mean(1).int(), "returned torch.int32; return a floating"),
    ("importance", lambda rows: 3.0, "returned float; return a floating-point tensor"),
    ("importance", lambda rows: -rows.A.norm(dim=1), "gave a negative number for expert 0"),
    ("importance", lambda rows: rows.missing, "failed: AttributeError: "),
    ("routing", lambda weights: weights.sum(1), "returned shape [21] on cpu, not [21, 2] on cpu"),
    ("routing", lambda weights: weights > 0, "returned torch.bool; return a floating-point"),
    ("routing", lambda weights: -weights, "gave a negative number for expert"),
    ("routing", lambda weights: weights @ weights, "failed: RuntimeError: "),
]


@pytest.mark.parametrize("auto_step", [True, False])
@pytest.mark.parametrize(("kind", "function", "text"), WRONG)
def test_a_wrong_answer_names_the_signal(
    kind: str, function: Any, text: str, auto_step: bool
) -> None:
    function.__name__ = "mine"
    model = models.build()
    adapter = helpers.attach(model, auto_step=auto_step, **{kind: function})
    optimizer = helpers.adamw(adapter)

    def step() -> None:
        model(**helpers.batch()).loss.backward()
        optimizer.step()
        adapter.step()

    with pytest.raises(StatisticError) as caught:
        step()
    assert f"{kind} signal 'mine' {text}" in str(caught.value)
    assert adapter.engine.step_count == 0


def test_what_is_negative_in_padding_or_free_slots_does_not_matter() -> None:
    model = models.build()

    def routing(weights: Tensor) -> Tensor:
        weights[:4] = -1.0
        return weights

    def importance(rows: ProjectionRows) -> Tensor:
        return torch.where(rows.A.any(dim=1), 1.0, -1.0)

    adapter = helpers.attach(model, routing=routing, importance=importance)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, :4] = 0
    model(**helpers.batch(), attention_mask=mask).loss.backward()
    helpers.adamw(adapter).step()
    assert (adapter.engine.step_count, adapter.skipped_steps) == (1, 0)


@pytest.mark.parametrize("kind", ["importance", "routing"])
def test_a_signal_that_is_not_finite_skips_the_step(kind: str) -> None:
    model = models.build()
    inner: Any = {"importance": own_importance, "routing": own_routing}[kind]
    adapter = helpers.attach(model, **{kind: lambda given: inner(given) * torch.nan})
    model(**helpers.batch()).loss.backward()
    with pytest.warns(RuntimeWarning, match="routing or importance is not finite"):
        helpers.adamw(adapter).step()
    assert adapter.skipped_steps == 1


@pytest.mark.parametrize("checkpointed", [True, False])
def test_margin_needs_two_experts_per_token(checkpointed: bool) -> None:
    model: Any = models.build(num_experts_per_tok=1)
    helpers.attach(model, routing="margin")
    if checkpointed:
        helpers.checkpoint_activations(model, reentrant=False)
    with pytest.raises(StatisticError, match="selects one expert per token; use routing='weight'"):
        model(**helpers.batch())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"importance": "fischer"}, "no importance signal 'fischer'; did you mean 'fisher'?"),
        ({"routing": "margins"}, "no routing signal 'margins'; did you mean 'margin'?"),
        ({"routing": "fisher"}, "no routing signal 'fisher'; known: 'weight', 'margin', 'count'"),
        ({"importance": 3}, "importance must be a name (sensitivity, "),
        ({"importance": "own:mine"}, "is a callable of your own, whose code is not saved"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, Any], text: str) -> None:
    model = models.build()
    with pytest.raises(ValueError, match=r"signal|callable") as caught:
        helpers.attach(model, **options)
    assert text in str(caught.value)
    assert drlora_torch.adapters(model) == {}


def test_names_are_saved_and_callables_are_given_again(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model, importance=own_importance, routing="margin", auto_step=False)
    model(**helpers.batch()).loss.backward()  # between micro-batches
    adapter.save_pretrained(tmp_path)
    before = helpers.pending(adapter)

    def load(**options: Any) -> drlora_torch.Adapter:
        return drlora_torch.load(models.build(), tmp_path, **options)

    for options, text in (
        ({}, "load(model, path, importance=own_importance) goes on with it"),
        ({"importance": "fisher"}, "importance signal 'own_importance', not 'fisher'"),
        ({"importance": own_routing}, "importance signal 'own_importance', not 'own_routing'"),
        (
            {"importance": own_importance, "routing": own_routing},
            "routing signal 'margin', not 'own_routing'; leave routing out",
        ),
    ):
        with pytest.raises(drlora_torch.CheckpointError) as caught:
            load(**options)
        assert text in str(caught.value)
    again = load(importance=own_importance)
    assert str(again.options.routing) == "margin"
    after = helpers.pending(again)
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    adapter.step()
    again.step()
    assert repr(adapter.engine.state_dict()) == repr(again.engine.state_dict())
    adapter.restore(tmp_path)
    other = helpers.attach(models.build(), auto_step=False)
    with pytest.raises(drlora_torch.CheckpointError, match="importance 'own:own_importance'"):
        other.restore(tmp_path)
    used = load(trainable=False)
    with torch.no_grad():
        used.model(**helpers.batch())
    used.save_pretrained(tmp_path / "copy")
    assert str(load(trainable=False).options.importance) == "own:own_importance"


@pytest.mark.parametrize("name", signals.IMPORTANCE)
def test_scaled_gradients(name: str) -> None:
    """``adapter.step(grad_scale=...)``, and an optimizer that unscales by itself."""
    found = []
    for scale, by_hand in ((1.0, True), (1024.0, True), (1024.0, False)):
        model = models.build()
        adapter = helpers.attach(model, importance=name, auto_step=not by_hand)
        helpers.fill(adapter)
        spy, optimizer = Spy(adapter), helpers.adamw(adapter, fused=not by_hand)
        (model(**helpers.batch()).loss * scale).backward()
        if not by_hand:
            optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        optimizer.step()
        if by_hand:
            adapter.step(grad_scale=scale)
        found.append(np.stack([s for _, s, _ in spy.samples[0].values()]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


def test_a_signal_of_unknown_degree_is_refused_with_a_scale() -> None:
    model = models.build()

    def squares(rows: ProjectionRows) -> Tensor:
        return signals.fisher(rows)

    adapter = helpers.attach(model, importance=squares, auto_step=False)
    spy = Spy(adapter)
    (model(**helpers.batch()).loss * 4.0).backward()
    with pytest.raises(StatisticError, match=r"set squares\.degree = 1 \(like them\), 2"):
        adapter.step(grad_scale=4.0)
    squares.degree = 2  # type: ignore[attr-defined]
    adapter.step(grad_scale=4.0)
    for name, (_, s, _) in spy.samples[0].items():
        lora = adapter.layers[name].lora
        slots = [slots for _, slots in lora.items()]
        expected = sum(
            signals.fisher(ProjectionRows(x.lora_A, x.lora_B, x.lora_A.grad, x.lora_B.grad))
            for x in slots
        )
        wanted = lora.table.per_dimension(expected.detach().double().numpy() / 16)
        np.testing.assert_allclose(s, wanted, rtol=1e-6)
        assert wanted.any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own
def test_signals_in_a_compiled_model() -> None:
    """They are measured when backward has left the graph."""
    found = []
    for compiles in (False, True):
        torch.compiler.reset()
        model: Any = models.build()
        adapter = helpers.attach(model, importance=own_importance, routing=own_routing)
        spy, optimizer = Spy(adapter), helpers.adamw(adapter)
        if compiles:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        for seed in range(2):
            helpers.step(model, optimizer, seed)
        found.append([each for step in spy.samples for pair in step.values() for each in pair[:2]])
    torch.compiler.reset()
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)
        assert one.any()
