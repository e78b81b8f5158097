"""Both readers of ``drlora plan`` agree, and the one of Transformers knows the odd families."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import drlora_torch
from drlora_core.cli import main
from drlora_core.cli import plan as command
from drlora_core.model_shape import LayerShape, read_model_config
from drlora_torch.errors import ModelError
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.models.discovery import find_layers
from drlora_torch.models.shapes import build_skeleton, read_shape

MOE = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 32}


def write(tmp_path: Path, kind: str, **fields: Any) -> Path:
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "fields", "layers"),
    [
        ("olmoe", {}, 16),
        pytest.param("mixtral", {}, 32, marks=pytest.mark.slow),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, 11),
        ("deepseek_v2", {"n_routed_experts": 64, "first_k_dense_replace": 1}, 31),
        pytest.param("deepseek_v3", {}, 58, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {}, 36, marks=pytest.mark.slow),
        ("qwen3_vl_moe", {}, 24),
    ],
)
def test_both_readers_agree(tmp_path: Path, kind: str, fields: dict[str, Any], layers: int) -> None:
    path = write(tmp_path, kind, **fields)
    shape = read_shape(str(path))
    assert len(shape.layers) == layers
    assert dataclasses.replace(shape, total_parameters=None) == read_model_config(path)
    assert shape == read_shape(str(path / "config.json"))


@pytest.mark.parametrize(
    ("kind", "fields", "indices", "experts", "projections"),
    [
        (
            "llama4_text",
            MOE | {"interleave_moe_layer_step": 2, "num_local_experts": 4, "pad_token_id": 0},
            [1, 3],
            4,
            {"gate_up_proj": (64, 64), "down_proj": (32, 64)},
        ),
        (
            "jamba",
            MOE | {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
            [1, 3],
            4,
            {"gate_up_proj": (64, 64), "down_proj": (32, 64)},
        ),
        (
            "ernie4_5_moe",
            MOE | {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_layer_start_index": 2},
            [2, 3],
            4,
            {"gate_up_proj": (64, 32), "down_proj": (16, 64)},
        ),
        (
            "switch_transformers",
            {"d_model": 64, "d_ff": 32, "num_layers": 4, "num_sparse_encoder_layers": 2}
            | {"num_decoder_layers": 4, "num_sparse_decoder_layers": 1, "num_experts": 4},
            [1, 3, 1],
            4,
            {"wi": (64, 32), "wo": (32, 64)},
        ),
    ],
)
def test_odd_families_are_known(
    tmp_path: Path,
    kind: str,
    fields: dict[str, Any],
    indices: list[int],
    experts: int,
    projections: dict[str, tuple[int, int]],
) -> None:
    shape = read_shape(str(write(tmp_path, kind, **fields)))
    assert shape.model_type == kind
    assert shape.num_layers == 4
    assert shape.layers == tuple(LayerShape(index, experts, projections) for index in indices)


def test_the_reader_is_an_entry_point_of_the_project() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    line = f'[project.entry-points."{command.SHAPE_READERS}"]\ntorch = "(.*)"'
    found = re.search(line.replace("[", r"\["), project)
    assert found is not None
    entry = importlib.metadata.EntryPoint("torch", found[1], command.SHAPE_READERS)
    assert entry.load() is read_shape


def test_all_parameters_are_counted(tmp_path: Path) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    fields = MOE | {"num_experts": 4, "vocab_size": 32, "num_attention_heads": 4}
    model = OlmoeForCausalLM(OlmoeConfig(**fields))
    shape = read_shape(str(write(tmp_path, "olmoe", **fields)))
    assert shape.total_parameters == sum(p.numel() for p in model.parameters())


def test_the_class_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text = sizes | heads | {"vocab_size": 64, "num_hidden_layers": 2, "num_experts": 4}
    text |= {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
    vision = sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    built = build_skeleton(str(tmp_path))
    assert type(built) is type(model)
    assert read_shape(str(tmp_path)).total_parameters == model.num_parameters()
    names = [layer.name for layer in find_layers(built, on_meta=True)]
    assert names == [layer.name for layer in drlora_torch.discover(model)]
    config.architectures = ["unheard_of", "OlmoeForCausalLM", "AutoConfig"]
    config.save_pretrained(tmp_path)
    assert type(build_skeleton(str(tmp_path))).__name__ == "Qwen3VLMoeModel"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "unheard_of"}, "does not recognize this architecture"),
        ({"hidden_size": 8}, "Unrecognized model"),
        ({"model_type": "olmoe", "num_experts": "many"}, "cannot build the model"),
        ({"model_type": "llama", "num_hidden_layers": 1}, "no MoE layer that drlora knows"),
        ({"model_type": "doge", "num_hidden_layers": 1, "is_moe": True}, "no MoE layer that"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
            "cannot build the model",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of a model was run')")
    with pytest.raises(ModelError, match=message):
        read_shape(str(tmp_path))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs ``drlora plan`` with this reader."""
    monkeypatch.setattr(command, "_load_reader", lambda: read_shape)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def test_plan_asks_transformers_first(tmp_path: Path, plan: Any) -> None:
    path = write(tmp_path, "jamba", **MOE, num_experts=4, expert_layer_period=2)
    code, out, err = plan(path)
    assert (code, err) == (0, "")
    assert "jamba: 2 MoE layers of 4, 4 experts each, 8 in all" in out
    assert "in the model" in out


def test_plan_falls_back_to_the_fields_and_says_so(tmp_path: Path, plan: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MOE | {"model_type": "unheard_of", "num_experts": 4}))
    code, out, err = plan(path)
    assert code == 0
    assert "unheard_of: 4 MoE layers of 4" in out
    assert err.startswith("note: Transformers cannot build")
    code, out, err = plan(path, "--num-experts", 8)
    assert (code, err) == (0, "")
    assert "8 experts each, 32 in all" in out


def test_plan_gives_both_reasons_if_both_readers_fail(tmp_path: Path, plan: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    code, out, err = plan(path)
    assert (code, out) == (2, "")
    assert "no MoE layer that drlora knows" in err
    assert "by its fields alone: " in err
    assert err.count("\n") == 1
    assert "No such file or directory" in plan(tmp_path / "none.json")[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 1000}, ["--steps", 1000]),
        ({"steps": 30, "timetable": "late"}, ["--steps", 30, "--timetable", "late"]),
        (
            {"steps": 400, "r_init": 2, "r_target": 4},
            ["--steps", 400, "--r-init", 2, "-s", "r_target=4"],
        ),
        ({"steps": 200, "warmup_steps": 30}, ["--steps", 200, "-s", "warmup_steps=30"]),
        (
            {"steps": 64, "policy": "rescored", "max_growth": 4},
            ["--steps", 64, "-s", "policy=rescored", "-s", "max_growth=4"],
        ),
    ],
)
def test_plan_has_the_timetable_of_finetune(
    tmp_path: Path, plan: Any, options: dict[str, Any], words: list[object]
) -> None:
    path = write(tmp_path, "olmoe", **MOE, num_experts=4)
    config = FinetuneOptions(model="m", data="d.jsonl", **options).allocator_config()
    code, out, _ = plan(path, *words, "--json")
    assert code == 0
    made = json.loads(out)
    assert made["config"] == config.model_dump(mode="json")
    assert [event["step"] for event in made["timetable"]["4"]] == list(config.growth_steps)
    assert made["steps"] == options["steps"]
    steps = f"{options['steps']:,}"
    named = options.get("timetable", "sprout")
    assert f"timetable {named} of {steps} steps, as of drlora finetune" in plan(path, *words)[1]
