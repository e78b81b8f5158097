"""A profile of a model: the right numbers, and a model that is as before."""

from __future__ import annotations

import functools
import json
import logging
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine, Recording, replay
from drlora_core.cli import main
from drlora_torch import signals
from drlora_torch.adapter import Adapter
from tests.torch import helpers, models
from tests.torch.conventions import handwritten


def batches() -> list[dict[str, Tensor]]:
    found = [helpers.batch(seed, rows=2) for seed in range(3)]
    mask = torch.ones_like(found[1]["input_ids"])
    mask[0, :3] = 0
    found[1]["attention_mask"] = mask
    return found


def rows_of_A() -> dict[tuple[str, str], Tensor]:
    """The random directions of a LoRA of rank 1, row by expert."""
    config = AllocatorConfig(r_init=1, r_target=1, r_max=1, policy="uniform", growth_end=0)
    adapter = drlora_torch.attach(models.build(), AllocatorEngine(config))
    return {
        (layer, projection): slots.lora_A.detach().clone()
        for layer, projection, _, slots in helpers.projections(adapter)
    }


def reference(batch: dict[str, Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Phi and mean |dL/dB| of each expert, from the gradients of the plain model's own weights."""
    model: Any = models.build()
    calls: dict[str, Any] = {}
    rows = rows_of_A()
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.mlp.experts"
        layer.mlp.gate.register_forward_hook(lambda m, a, out, name=name: calls.update({name: out}))
    model(**batch).loss.backward()
    keep = batch.get("attention_mask", torch.ones(2, 7)).reshape(-1)
    found = {}
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.mlp.experts"
        _, weights, chosen = calls[name]
        phi, g = np.zeros(models.EXPERTS), np.zeros(models.EXPERTS)
        for token in range(14):
            for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
                phi[expert] += weight * float(keep[token]) / float(keep.sum())
        for expert in range(models.EXPERTS):
            for projection in ("gate_up_proj", "down_proj"):
                gradient = getattr(layer.mlp.experts, projection).grad[expert]
                g[expert] += (gradient @ rows[name, projection][expert]).abs().mean().item()
        found[name] = phi, g
    return found


def compare() -> None:
    model = models.build()
    recording = drlora_torch.profile(model, iter(batches()))
    assert recording.steps == 3
    for step, batch in enumerate(batches()):
        for name, (phi, g) in reference(batch).items():
            record = recording.layer(name)
            np.testing.assert_allclose(record.routing[step], phi, rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(record.importance[step], g, rtol=1e-4, atol=1e-8)
            assert record.tokens[step] == (11 if step == 1 else 14)
            assert g.max() > 0


def test_routing_and_gradients_of_the_experts() -> None:
    compare()


class WithLoss(nn.Module):
    """A model with a Linear for each expert."""

    def __init__(self) -> None:
        super().__init__()
        handwritten.register()
        self.inner = handwritten.Model(dtype=torch.float32)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
        logits = self.inner(**inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(loss=loss)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "linears"])
def test_gradients_of_the_weights_themselves(family: str) -> None:
    """Against a backward pass of the plain model, all of whose parameters learn."""
    make: Any = WithLoss if family == "linears" else functools.partial(models.build, family)
    plain, model = make(), make()
    recording = drlora_torch.profile(model, batches(), importance="weight_gradient")
    for step, batch in enumerate(batches()):
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name, experts in recording.layers.items():
            layer = plain.get_submodule(name)
            squares = np.zeros(experts)
            for expert in range(experts):
                for key, parameter in layer.named_parameters():
                    if key in ("gate_up_proj", "down_proj"):
                        squares[expert] += parameter.grad[expert].double().square().sum().item()
                    elif f"experts.{expert}." in key and key.endswith("weight"):
                        squares[expert] += parameter.grad.double().square().sum().item()
            found = recording.layer(name).importance[step]
            np.testing.assert_allclose(found, np.sqrt(squares), rtol=1e-4, atol=1e-7)
            assert squares.any()
    own = drlora_torch.profile(model, batches())
    assert np.array_equal(own.routing, recording.routing)


def test_packed_weights_have_no_gradients() -> None:
    model = models.build("qwen3_moe")
    drlora_torch.quantize_experts(model)
    with pytest.raises(
        drlora_torch.ModelError, match=r"is packed \(nf4\): only weights in a float"
    ):
        drlora_torch.profile(model, batches(), importance="weight_gradient")
    assert drlora_torch.profile(model, batches()).importance.any()
    assert drlora_torch.adapters(model) == {}


def test_gradients_that_pile_up_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Adapter.parameters
    detached = [nn.Parameter(torch.zeros(1))]
    monkeypatch.setattr(Adapter, "parameters", lambda self: inner(self) and detached)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare()


def snapshot(model: Any) -> list[Any]:
    parts: list[Any] = [torch.get_rng_state().tolist(), sorted(vars(model)), model.config.to_dict()]
    for name, module in model.named_modules():
        parts.append((name, type(module), module.training, sorted(vars(module))))
        parts.append([len(hooks) for key, hooks in vars(module).items() if "hooks" in key])
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        gradient = None if parameter.grad is None else parameter.grad.tolist()
        parts.append((name, parameter.requires_grad, parameter.tolist(), gradient))
    return parts


@pytest.mark.parametrize("importance", ["gradient", "weight_gradient"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(
    importance: str, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters, gradients, modes, hooks and random state; when it fails, too."""
    model: Any = models.build(attention_dropout=0.5, output_router_logits=False)
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.full((models.HIDDEN,), 3.0)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.grad = torch.ones_like(experts.down_proj)
    experts.gate_up_proj.requires_grad_(False)
    torch.manual_seed(7)
    before, given = snapshot(model), batches()
    if fails:
        del given[2]["labels"]
        with pytest.raises(drlora_torch.ModelError, match=r"batch 3 gives no loss: batches need l"):
            drlora_torch.profile(model, given, importance=importance)
    else:
        with caplog.at_level(logging.WARNING):
            drlora_torch.profile(model, given, importance=importance)
        assert "evaluation mode" not in caplog.text
    assert snapshot(model) == before
    assert drlora_torch.adapters(model) == {}


def test_a_profile_is_a_recording_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile"
    recording = drlora_torch.profile(models.build(), batches(), output=path)
    read = Recording.open(path)
    for name in ("routing", "importance", "tokens", "presence"):
        assert np.array_equal(getattr(read, name), getattr(recording, name))
    assert (read.config, read.events, read.notes) == (None, (), ())
    config = AllocatorConfig(**helpers.CONFIG, use_importance=False)
    assert replay(read, config).steps == 3
    for command in ("replay", "report"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(path), "--json"])
        assert not stopped.value.code
        assert json.loads(capsys.readouterr().out)["final_ranks"]


def test_ranks_from_a_profile_train_and_grow() -> None:
    recording = drlora_torch.profile(models.build(), batches())
    for policy, start, end in (("uniform", 32, 32), ("greedy", 24, 32)):
        config = AllocatorConfig(
            **{**helpers.CONFIG, "r_init": 0, "r_max": 16, "policy": policy, "max_growth": None}
        )

        def three_quarters(request: Any) -> Any:
            ranks = np.zeros_like(request.ranks)
            ranks[np.argsort(-request.routing)[:2]] = request.quota * 3 // 8
            return ranks

        chosen: Any = "sieve" if policy == "uniform" else three_quarters
        model = models.build()
        engine = AllocatorEngine.from_profile(config, recording, chosen)
        adapter = drlora_torch.attach(model, engine)
        totals = [sum(adapter.ranks()[name].sum() for name in adapter.layers) / 2]
        optimizer = helpers.adamw(adapter)
        for seed in range(6):
            helpers.step(model, optimizer, seed)
        totals.append(sum(adapter.ranks()[name].sum() for name in adapter.layers) / 2)
        assert totals == [start, end]
        assert adapter.skipped_steps == 0
        assert min(ranks.min() for ranks in adapter.ranks().values()) == 0


def test_signals_and_layers_of_a_profile() -> None:
    name = "model.layers.1.mlp.experts"
    model, given = models.build(), batches()[:1]
    recording = drlora_torch.profile(
        model, given, layers=["*.1.*"], routing="count", importance=lambda rows: rows.A[:, 0] ** 2
    )
    assert list(recording.layers) == [name]
    assert recording.routing.sum() == pytest.approx(models.TOP_K)
    rows = rows_of_A()
    expected = sum(rows[name, each][:, 0].double() ** 2 for each in ("gate_up_proj", "down_proj"))
    np.testing.assert_allclose(recording.importance[0], expected, rtol=1e-6)
    one, other = (
        drlora_torch.profile(model, given, importance="fisher", seed=seed) for seed in range(2)
    )
    assert (one.importance != other.importance).any()


def with_adapter(model: nn.Module) -> nn.Module:
    helpers.attach(model, adapter_name="law")
    return model


@pytest.mark.parametrize(
    ("prepare", "given", "options", "text"),
    [
        (
            with_adapter,
            1,
            {},
            "the model has an adapter (law), and a profile is of a model without",
        ),
        (None, 0, {}, "there are no batches to profile the model on"),
        (None, 1, {"importance": "gradeint"}, "did you mean 'gradient'?"),
        (None, 1, {"routing": "mass"}, "no routing signal 'mass'; known: 'weight', 'margin'"),
        (None, 1, {"layers": ["*.9.*"]}, "*.9.*"),
        (None, 1, {"output": Path(__file__)}, "is not empty; choose a new path"),
        (None, 1, {"ouput": "x"}, "profile() has no argument 'ouput'; did you mean 'output'?"),
        *(
            (None, 1, {"importance": name}, f"importance='{name}' is 0 for every expert before")
            for name in ("sensitivity", "sensitivity_per_token", "update_norm")
        ),
    ],
)
def test_what_cannot_work_is_refused(
    prepare: Any, given: int, options: dict[str, Any], text: str
) -> None:
    model = models.build()
    before = len(drlora_torch.adapters((prepare or nn.Module.train)(model)))
    with pytest.raises(ValueError, match=r".") as caught:
        drlora_torch.profile(model, batches()[:given], **options)
    assert text in str(caught.value)
    assert len(drlora_torch.adapters(model)) == before


def test_batches_that_are_no_dicts_are_refused() -> None:
    """One dict instead of a list of them is such a thing: its keys would be the batches."""
    model = models.build()
    with pytest.raises(drlora_torch.ModelError, match=r"batch 1 is a str; .* iterable of dicts"):
        drlora_torch.profile(model, helpers.batch())  # type: ignore[arg-type]
    assert not drlora_torch.adapters(model)


@pytest.mark.parametrize("name", signals.IMPORTANCE)
def test_what_is_0_where_B_is_0(name: str) -> None:
    """The signals that a profile refuses are those that are always 0 there, and no others."""
    model = models.build()
    adapter = helpers.attach(model, importance=name)
    spy = helpers.Spy(adapter)
    model(**helpers.batch()).loss.backward()
    helpers.adamw(adapter).step()
    measured = any(s.any() for _, s, _ in spy.samples[0].values())
    assert measured == (name not in drlora_torch.profiling.ZERO_AT_START)


def test_gradients_that_others_take_are_missed_aloud() -> None:
    model = models.build("qwen3_moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    required = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(drlora_torch.ModelError, match="two layers share them; use importance='gr"):
        drlora_torch.profile(model, batches(), importance="weight_gradient")
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert not drlora_torch.adapters(model)
