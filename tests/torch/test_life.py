"""Attach, refuse, detach, merge: the model and the engine before and after."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import drlora_torch
from drlora_core import LayoutError, UnknownLayerError
from tests.torch import helpers, models, reference

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Picture:
    """Everything of a model that ``attach`` touches or might."""

    def __init__(self, model: Any) -> None:
        self.names = list(model.state_dict())
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.identity = [id(parameter) for parameter in model.parameters()]
        self.required = {n: p.requires_grad for n, p in model.named_parameters()}
        self.training = [module.training for module in model.modules()]
        self.attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
        self.configs = {n: id(getattr(m, "config", None)) for n, m in model.named_modules()}
        self.config = model.config.to_dict() if hasattr(model, "config") else None
        self.ignored = copy.deepcopy(getattr(model, "_keys_to_ignore_on_save", None))
        self.implementation = getattr(getattr(model, "config", None), "_experts_implementation", 0)
        self.hooks = {n: [len(getattr(m, h)) for h in HOOKS] for n, m in model.named_modules()}
        self.global_hooks = set(torch_optimizer._global_optimizer_pre_hooks)
        self.modules = {n: type(m) for n, m in model.named_modules()}

    def assert_unchanged(self, model: Any) -> None:
        now = Picture(model)
        for field in vars(self):
            if field == "global_hooks":  # those of dead models may go at any time
                assert now.global_hooks <= self.global_hooks
            elif field != "values":
                assert getattr(now, field) == getattr(self, field), field
        assert all(helpers.equal(now.values[name], value) for name, value in self.values.items())


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_detach_restores_the_model(family: str, layout: str) -> None:
    model = models.build(family)
    model.get_input_embeddings().weight.requires_grad_(False)
    picture = Picture(model)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(models.tokens()).logits
    adapter = helpers.attach(model, layout=layout, dropout=0.1)
    assert len(model.state_dict()) > len(picture.names)
    optimizer = helpers.adamw(adapter)
    for seed in range(5):
        helpers.step(model, optimizer, seed)
    assert adapter.detach() is model
    picture.assert_unchanged(model)
    with torch.no_grad():
        assert torch.equal(model(models.tokens()).logits, logits)


def test_detached_adapter_says_so() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    adapter.detach()
    for use in (adapter.detach, adapter.merge, adapter.parameters, adapter.step):
        with pytest.raises(drlora_torch.AttachError, match="was detached or merged"):
            use()
    for use in (adapter.disabled, adapter.paused):
        with pytest.raises(drlora_torch.AttachError, match="was detached"), use():
            pass
    assert helpers.attach(model).ranks()


def test_attach_again_after_detach() -> None:
    runs = []
    model = models.build()
    for _ in range(2):
        adapter = helpers.attach(model)
        optimizer = helpers.adamw(adapter)
        runs.append([helpers.step(model, optimizer, seed) for seed in range(3)])
        adapter.detach()
    assert runs[0] == runs[1]


def test_attach_twice_is_refused() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    picture = Picture(model)
    engine = helpers.engine()
    with pytest.raises(drlora_torch.AttachError, match=r"has an adapter already; call its detach"):
        drlora_torch.attach(model, engine)
    picture.assert_unchanged(model)
    assert engine.layer_names == ()
    assert len(adapter.parameters()) == 8


def test_a_model_without_experts_is_refused() -> None:
    for model in (nn.Linear(3, 3), nn.Sequential()):
        with pytest.raises(drlora_torch.ModelError, match="no mixture-of-experts layer"):
            helpers.attach(model)
    with pytest.raises(drlora_torch.ModelError, match=r"must be a torch\.nn\.Module, got dict"):
        helpers.attach({})  # type: ignore[arg-type]


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"alpha": 0.0}, ValueError, "alpha"),
    ({"alpha": float("nan")}, ValueError, "alpha"),
    ({"alpha": "much"}, ValueError, "alpha"),
    ({"dropout": 1.0}, ValueError, "dropout"),
    ({"dropout": -0.1}, ValueError, "dropout"),
    ({"router": "sometimes"}, ValueError, "router"),
    ({"layout": "packed"}, ValueError, "layout"),
    ({"newborn": "old"}, ValueError, "newborn"),
    ({"dtype": torch.int8}, ValueError, "not a floating-point dtype"),
    ({"dtype": "bfloat61"}, ValueError, "did you mean 'bfloat16'"),
    ({"targets": ["gate_up"]}, UnknownLayerError, "did you mean 'gate_up_proj'"),
    ({"targets": []}, ValueError, "targets"),
    ({"layers": ["model.layers.9.mlp.experts"]}, UnknownLayerError, "did you mean 'model.layers"),
    ({"layers": ["*.mlp.expert"]}, UnknownLayerError, r"no MoE layer matches"),
    ({"layers": []}, ValueError, "layers"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=str)
def test_bad_options_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, engine = models.build(), helpers.engine()
    picture = Picture(model)
    with pytest.raises(error, match=message):
        drlora_torch.attach(model, engine, **options)
    picture.assert_unchanged(model)
    assert engine.layer_names == ()
    assert engine.state_dict()["layers"] == {}


@pytest.mark.parametrize(
    ("fields", "layout", "field"),
    [({"r_target": 100_000}, "pooled", "r_target"), ({}, "masked", "r_max")],
)
def test_a_lora_that_dwarfs_its_experts_is_refused(
    fields: dict[str, int], layout: str, field: str
) -> None:
    """Before it is allocated: a recipe of a stranger could fill the memory."""
    model = models.build()
    with pytest.raises(ValueError, match=f"more than 4 times .*; use a smaller {field}"):
        helpers.attach(model, config={**fields, "r_max": 100_000}, layout=layout)
    assert drlora_torch.adapters(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_engine_must_be_an_engine_of_these_layers() -> None:
    model = models.build()
    picture = Picture(model)
    with pytest.raises(drlora_torch.AttachError, match="must be an AllocatorEngine, got dict"):
        drlora_torch.attach(model, {})  # type: ignore[arg-type]
    engine = helpers.engine()
    engine.add_layer("model.layers.0.mlp.experts", models.EXPERTS)
    engine.add_layer("model.layers.1.mlp.experts", models.EXPERTS + 1)
    with pytest.raises(LayoutError, match=r"layers\.1\.mlp\.experts' has 9 experts .* 8 in"):
        drlora_torch.attach(model, engine)
    picture.assert_unchanged(model)
    assert len(engine.layer_names) == 2


def test_a_failure_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer cannot be adapted; the first is taken out again."""
    from drlora_torch.models.fused import Fused

    model, engine = models.build(), helpers.engine()
    picture = Picture(model)
    install, calls = Fused.install, []

    def fail_second(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no more")
        return install(*args)

    monkeypatch.setattr(Fused, "install", fail_second)
    with pytest.raises(MemoryError, match="no more"):
        drlora_torch.attach(model, engine)
    picture.assert_unchanged(model)
    monkeypatch.undo()
    assert drlora_torch.attach(model, engine).ranks()  # the engine is still good for this model


def test_chosen_layers_only() -> None:
    model = models.build()
    for layers in ("model.layers.1.*", ["*.1.mlp.experts"]):
        adapter = helpers.attach(model, layers=layers)
        assert list(adapter.ranks()) == ["model.layers.1.mlp.experts"]
        optimizer = helpers.adamw(adapter)
        for seed in range(6):
            helpers.step(model, optimizer, seed)
        assert sum(adapter.ranks()["model.layers.1.mlp.experts"]) == 4 * models.EXPERTS
        adapter.detach()


def test_switching_the_implementation_while_attached() -> None:
    """The model's own setting stays the user's; ours is a private copy of the config."""
    model = models.build()
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    with torch.no_grad():
        before = model(models.tokens()).logits
        model.set_experts_implementation("eager")
        assert torch.equal(model(models.tokens()).logits, before)
    adapter.detach()
    assert model.config._experts_implementation == "eager"
    assert model.model.layers[0].mlp.experts.config is model.config


def test_base_checkpoint_is_written_while_attached(tmp_path: Any) -> None:
    for family in ("olmoe", "gpt_oss"):
        model = models.build(family)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        adapter = helpers.attach(model)
        helpers.step(model.train(), helpers.adamw(adapter))
        model.eval().save_pretrained(tmp_path / family)
        again, report = type(model).from_pretrained(tmp_path / family, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        loaded = again.state_dict()
        assert loaded.keys() == base.keys()
        assert all(torch.equal(loaded[name], value) for name, value in base.items())
        assert again.config._experts_implementation == model.config._experts_implementation


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_merge_is_the_dense_model(family: str) -> None:
    model = models.build(family).eval()
    base = copy.deepcopy(model)
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    dense = reference.dense_copy(base, adapter)
    with torch.no_grad():
        adapted = model(models.tokens()).logits
    assert adapter.merge() is model
    assert list(model.state_dict()) == list(base.state_dict())
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(models.tokens()).logits, adapted, rtol=2e-5, atol=1e-5)


def test_merge_rounds_once_to_the_base_dtype() -> None:
    model = models.build(dtype=torch.bfloat16)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    name = "model.layers.0.mlp.experts"
    lora = adapter.layers[name].lora
    exact = base.get_submodule(name).down_proj[3].float() + reference.expert_delta(
        lora, "down_proj", 3
    )
    adapter.merge()
    merged = model.get_submodule(name).down_proj[3].float()
    assert bool(((merged - exact).abs() <= 2.0**-8 * exact.abs()).all())


def test_moving_the_model_moves_the_lora() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    model.to(torch.float64)
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    helpers.uneven(adapter)
    assert model(models.tokens()).logits.dtype == torch.float64


def test_disabled_equals_the_base_model_bit_for_bit() -> None:
    for family in models.FAMILIES:
        model = models.build(family).eval()
        with torch.no_grad():
            base: Tensor = model(models.tokens()).logits
            adapter = helpers.attach(model)
            helpers.uneven(adapter)
            adapted = model(models.tokens()).logits
            with adapter.disabled():
                assert torch.equal(model(models.tokens()).logits, base)
            assert not torch.allclose(adapted, base)
            assert torch.equal(model(models.tokens()).logits, adapted)


def test_a_copy_is_refused() -> None:
    """It would share the engine, and the hooks that follow the forwards, with the original."""
    model = models.build()
    adapter = helpers.attach(model)
    for what in (model, adapter):
        with pytest.raises(drlora_torch.AttachError, match="neither copied nor pickled"):
            copy.deepcopy(what)
    adapter.detach()
    assert copy.deepcopy(model)(models.tokens()).logits.isfinite().all()


def test_an_engine_decides_for_one_live_adapter() -> None:
    model = models.build()
    engine = helpers.attach(model).engine
    other = models.build()
    picture = Picture(other)
    with pytest.raises(drlora_torch.AttachError, match="adapter 'default' of a OlmoeForCausalLM"):
        drlora_torch.attach(other, engine)
    picture.assert_unchanged(other)


def test_an_engine_is_free_again_with_its_model_gone() -> None:
    engine = helpers.engine()
    drlora_torch.attach(models.build(), engine)
    gc.collect()
    assert drlora_torch.attach(models.build(), engine).is_active


def test_an_engine_with_steps_is_taken_by_load_alone(tmp_path: Any) -> None:
    """A notebook cell that is run again: no second run with the first run's ranks."""
    model = models.build()
    adapter = helpers.attach(model)
    helpers.step(model, helpers.adamw(adapter))
    adapter.save_pretrained(tmp_path)
    used = adapter.engine
    adapter.detach()
    with pytest.raises(drlora_torch.AttachError, match="the engine has made 1 steps already"):
        drlora_torch.attach(model, used)
    assert not drlora_torch.adapters(model)
    assert drlora_torch.load(model, tmp_path).engine.step_count == 1


def test_an_adapter_starts_with_the_ranks_that_its_engine_was_given() -> None:
    engine = helpers.engine()
    wanted = {}
    for name in (layer.name for layer in drlora_torch.discover(models.build())):
        wanted[name] = np.array([5, 2, 3, 2, 2, 2, 8, 2])
        engine.add_layer(name, num_experts=8, ranks=wanted[name])
    adapter = drlora_torch.attach(models.build(), engine)
    assert {n: r.tolist() for n, r in adapter.ranks().items()} == {
        n: r.tolist() for n, r in wanted.items()
    }


def test_a_method_that_the_user_has_set_stays() -> None:
    model = models.build()
    model.save_pretrained = own = lambda folder: folder
    adapter = helpers.attach(model)
    assert model.save_pretrained is not own
    adapter.detach()
    assert model.save_pretrained is own


def test_a_detached_model_is_freed_at_once() -> None:
    model = models.build()
    helpers.attach(model).detach()
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()
