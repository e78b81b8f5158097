"""Plans from configurations of real families, worked out by hand where it matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic_core
import pytest

from drlora_core import AllocatorConfig, LayoutError
from drlora_core.memory_forecast import RunOptions
from drlora_core.model_shape import LayerShape, ModelShape, read_model_config
from drlora_core.plan import make_plan, planned_events, step_of_budget
from tests.core.conftest import OLMOE

KIMI = {
    "model_type": "kimi_k2",
    "n_routed_experts": 384,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
}
IN_BFLOAT16 = RunOptions(lora_dtype="bfloat16")


def write(tmp_path: Path, values: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "layers", "experts"),
    [
        (OLMOE, list(range(16)), 64),
        (KIMI, list(range(1, 61)), 384),
        (QWEN, [1, 5], 128),
        (QWEN | {"mlp_layer_types": ["dense", "sparse"] * 3}, [1, 3, 5], 128),
        ({"model_type": "vl", "text_config": OLMOE}, list(range(16)), 64),
    ],
)
def test_moe_layers_are_found(
    tmp_path: Path, values: dict[str, Any], layers: list[int], experts: int
) -> None:
    shape = read_model_config(write(tmp_path, values))
    assert [layer.index for layer in shape.layers] == layers
    assert {layer.num_experts for layer in shape.layers} == {experts}
    assert shape.model_type == values["model_type"]
    assert shape == read_model_config(tmp_path)


def test_layers_may_differ() -> None:
    small = LayerShape(1, 8, {"up_proj": (4, 6), "down_proj": (6, 4)})
    large = LayerShape(2, 16, {"up_proj": (4, 10), "down_proj": (10, 4)})
    plan = make_plan(ModelShape("mixed", 3, (small, large)), AllocatorConfig())
    assert list(plan.timetable) == [8, 16]
    assert plan.expert_parameters == 8 * 48 + 16 * 80
    assert plan.storages[0].parameters == 16 * (8 * 20 + 16 * 28)
    assert plan.peft_transient == 4 * 16 * 80


def test_parameters_and_bytes_of_olmoe(tmp_path: Path) -> None:
    plan = make_plan(read_model_config(write(tmp_path, OLMOE)), AllocatorConfig(), IN_BFLOAT16)
    slot = (2048 + 2 * 1024) + (1024 + 2048)
    assert {layer.slot_parameters for layer in plan.shape.layers} == {slot}
    assert plan.expert_parameters == 16 * 64 * 3 * 2048 * 1024
    ways = {way.name: way for way in plan.storages}
    uniform, pooled = ways["uniform LoRA at r_target"], ways["drlora, layout pooled"]
    assert uniform.parameters == 16 * 64 * 16 * slot
    assert pooled.parameters == uniform.parameters
    assert ways["drlora, layout masked"].parameters == 2 * uniform.parameters
    assert ways["PEFT target_parameters at r_max"].parameters == 16 * 64 * 32 * slot
    assert ways["active at the start"].parameters == 16 * 64 * 8 * slot
    assert uniform.weights == 2 * uniform.parameters
    assert uniform.adam == 2 * uniform.gradients
    assert uniform.total == 8 * uniform.parameters
    assert plan.peft_transient == 2 * 64 * 3 * 2048 * 1024
    assert pydantic_core.to_jsonable_python(plan)["config"]["r_init"] == 8


def test_pooled_storage_follows_scope_and_policy(tmp_path: Path) -> None:
    shape = read_model_config(write(tmp_path, OLMOE))
    cases: dict[str, dict[str, Any]] = {
        "global": {"scope": "global", "layer_ceiling": 20},
        "prune": {"policy": "prune", "r_init": 24},
        "move": {"policy": "move"},
    }
    pooled = {
        name: make_plan(shape, AllocatorConfig(**changes)).storages[0].rank
        for name, changes in cases.items()
    }
    assert pooled == {"global": 20, "prune": 24, "move": 16}


@pytest.mark.parametrize(
    ("changes", "totals", "met"),
    [
        ({}, [9, 12], 10),
        ({"quota": 4}, [10, 12], 10),
        ({"quota": 2}, [8, 10], None),
        ({"policy": "uniform"}, [12, 12], 0),
        ({"policy": "prune", "r_init": 8}, [13, 12], 10),
        ({"r_init": 4}, [12, 12], 0),
        ({"policy": "move", "r_init": 4}, [12, 12], 0),
        ({"policy": "move"}, [9, 12], 10),
    ],
)
def test_the_timetable(changes: dict[str, Any], totals: list[int], met: int | None) -> None:
    settings = {"r_init": 2, "r_target": 4, "r_max": 8, "warmup_steps": 0}
    settings |= {"growth_interval": 5, "growth_end": 10}
    config = AllocatorConfig(**(settings | changes))
    events = planned_events(config, 3)
    assert [event.total for event in events] == totals
    assert [event.step for event in events] == [5, 10]
    assert step_of_budget(config, 3) == met
    moves = config.policy == "move"
    starts = [3 * config.starting_rank, totals[0]]
    most = [2 * starts[0] // 10, starts[1] // 10] if moves else [0, 0]  # 20 %, then half of that
    assert [event.most_moved for event in events] == most


def test_values_by_hand_replace_the_file(tmp_path: Path) -> None:
    shape = read_model_config(
        write(tmp_path, {"model_type": "own", "num_hidden_layers": 9}),
        num_experts=4,
        moe_layers=3,
        hidden_size=8,
        intermediate_size=6,
        gated=False,
    )
    projections = {"up_proj": (8, 6), "down_proj": (6, 8)}
    assert shape.layers == tuple(LayerShape(index, 4, projections) for index in range(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "JSON list, not a model"),
        (
            {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8},
            "has no field n_routed_experts or num_local_experts or num_experts; use --num",
        ),
        (OLMOE | {"num_experts": 1}, "has no MoE layer"),
        (OLMOE | {"num_experts": "many"}, "num_experts is 'many'"),
        (
            OLMOE | {"num_experts": [8, 8]},
            r"num_experts is \[8, 8\]; accepted: whole numbers from 1 to",
        ),
        (OLMOE | {"hidden_size": -1}, "hidden_size is -1"),
        (OLMOE | {"hidden_size": True}, "hidden_size is True"),
        (
            {"num_experts": 8, "num_hidden_layers": 2, "hidden_size": 4},
            "use --intermediate-size",
        ),
        ({"num_experts": 8, "hidden_size": 4}, "no field num_hidden_layers; use --moe-layers"),
        (OLMOE | {"mlp_layer_types": ["sparse"]}, "does not fit the 16 layers"),
        (KIMI | {"moe_layer_freq": [0, 1]}, "does not know moe_layer_freq"),
        (OLMOE | {"interleave_moe_layer_step": 2}, "does not know interleave_moe_layer_step"),
        (OLMOE | {"moe_layers": [0, 3]}, "does not know moe_layers"),
        (OLMOE | {"expert_layer_period": 2}, "does not know expert_layer_period"),
        (OLMOE | {"moe_layer_start_index": 1}, "does not know moe_layer_start_index"),
        (OLMOE | {"hybrid_override_pattern": "ME*E"}, "use --moe-layers, or install drlora.torch"),
        (QWEN | {"decoder_sparse_step": -2}, "decoder_sparse_step is -2"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_model_config(write(tmp_path, values))


def test_more_moe_layers_than_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"20 MoE layers are given, but .* has 16 layers"):
        read_model_config(write(tmp_path, OLMOE), moe_layers=20)
