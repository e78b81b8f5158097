"""The memory of a run: bytes by hand, properties of the forecast, the table of ``drlora plan``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocatorConfig, LayoutError
from drlora_core.memory_forecast import (
    BYTES,
    GROUP_BYTES,
    KERNELS,
    QUANTIZATIONS,
    MemoryForecast,
    RunOptions,
    activation_bytes,
    expert_bytes,
    forecast,
    unpacked_bytes,
    weight_bytes,
)
from drlora_core.model_shape import LayerShape, ModelShape, read_model_config, token_sizes

QWEN = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}
LAYER = LayerShape(0, 128, {"gate_up_proj": (2048, 1536), "down_proj": (768, 2048)})
sizes = st.integers(1, 300)


def shape(layers: int = 2, rest: int | None = 1000, **changes: Any) -> ModelShape:
    small = LayerShape(0, 8, {"gate_up_proj": (64, 48), "down_proj": (24, 64)})
    total = None if rest is None else rest + layers * small.expert_parameters
    fields = {"hidden_size": 64, "vocab_size": 100, "experts_per_token": 2} | changes
    return ModelShape("tiny", layers, (small,) * layers, total, **fields)


runs = st.builds(
    RunOptions,
    lora_dtype=st.sampled_from(list(BYTES)),
    quantization=st.sampled_from(QUANTIZATIONS),
    double_quant=st.booleans(),
    base_dtype=st.sampled_from(list(BYTES)),
    kernel=st.sampled_from(KERNELS),
    tokens=st.integers(1, 4096),
    checkpointing=st.booleans(),
)


def bits(run: RunOptions) -> int:
    """Of a code or number."""
    codes = {"nf4": 4, "fp4": 4, "mxfp4": 4, "fp8": 8}
    return codes.get(run.quantization, 8 * BYTES[run.base_dtype])


def parts(made: MemoryForecast) -> list[int | None]:
    values = dataclasses.asdict(made)
    return [values[name] for name in values if name not in ("options", "total")]


@pytest.mark.parametrize(
    ("rows", "columns", "changes", "wanted"),
    [
        (1536, 2048, {"quantization": "nf4"}, 1572864 + 49152 + 4 * 192 + 4),
        (1536, 2048, {"quantization": "fp4", "double_quant": False}, 1572864 + 4 * 49152),
        (3, 5, {"quantization": "nf4"}, 8 + 1 + 4 + 4),
        (65, 1, {"quantization": "nf4", "double_quant": False}, 33 + 8),
        (1, 64 * 257, {"quantization": "fp4"}, 32 * 257 + 257 + 8 + 4),
        (1536, 2048, {"quantization": "fp8"}, 1536 * 2048 + 4 * 12 * 16),
        (129, 1, {"quantization": "fp8"}, 129 + 8),
        (2, 64, {"quantization": "mxfp4"}, 2 * 34),
        (2, 33, {"quantization": "mxfp4"}, 2 * 34),
        (3, 5, {"base_dtype": "float32"}, 60),
        (3, 5, {}, 30),
    ],
)
def test_bytes_of_a_weight_by_hand(
    rows: int, columns: int, changes: dict[str, Any], wanted: int
) -> None:
    assert weight_bytes(rows, columns, RunOptions(**changes)) == wanted


@given(sizes, sizes, runs)
def test_a_weight_takes_the_bits_of_its_name(rows: int, columns: int, run: RunOptions) -> None:
    size = weight_bytes(rows, columns, run)
    assert bits(run) * rows * columns <= 8 * size
    assert size <= weight_bytes(rows + 1, columns, run)
    assert size <= weight_bytes(rows, columns + 1, run)
    whole = 128 * 128 * rows * columns
    assert bits(run) * whole <= 8 * weight_bytes(128 * rows, 128 * columns, run)
    assert 8 * weight_bytes(128 * rows, 128 * columns, run) <= (bits(run) + 0.5) * whole


@given(st.integers(1, 4), runs, st.none() | st.integers(0, 10**6))
def test_the_total_is_the_sum_of_what_is_known(
    layers: int, run: RunOptions, rest: int | None
) -> None:
    made = forecast(shape(layers, rest), AllocatorConfig(), run)
    assert made.total == sum(size for size in parts(made) if size is not None)
    assert made.rest == (None if rest is None else rest * BYTES[run.base_dtype])
    assert made.gradients == made.lora
    assert made.optimizer == 2 * made.lora
    assert made.lora == BYTES[run.lora_dtype] * layers * 8 * 16 * (64 + 48 + 24 + 64)
    assert made.experts == layers * expert_bytes(shape().layers[0], run)
    assert made.activations is not None
    assert (made.unpacked == 0) == (run.quantization == "none")


@given(st.integers(2, 5), runs)
def test_activations_grow_with_everything(layers: int, run: RunOptions) -> None:
    def size(options: RunOptions = run, count: int = layers, **changes: Any) -> int:
        found = activation_bytes(shape(count, **changes), options)
        assert found is not None
        return found

    assert size(dataclasses.replace(run, tokens=run.tokens + 1)) > size()
    assert size(count=layers + 1) > size()
    assert size(vocab_size=101) >= size()
    assert size(experts_per_token=3) >= size()
    assert size(dataclasses.replace(run, checkpointing=True)) <= size(
        dataclasses.replace(run, checkpointing=False)
    )
    assert size(dataclasses.replace(run, kernel="ragged")) <= size(
        dataclasses.replace(run, kernel="grouped")
    )


def test_activations_by_hand() -> None:
    run = RunOptions(tokens=10, kernel="ragged", base_dtype="bfloat16")
    pair = 2 * (64 + 48 + 24 + 64)  # two experts per token
    layer = 10 * 2 * (7.5 * 64 + 1.4 * pair)
    inputs = 2 * 10 * 64 * 2
    assert activation_bytes(shape(), run) == pytest.approx(inputs + layer, abs=1)
    assert activation_bytes(shape(vocab_size=10**6), run) == inputs + 10 * 12 * 10**6
    whole = dataclasses.replace(run, checkpointing=False)
    kept = 2 * 10 * 2 * (7.5 * 64 + 0.7 * pair)
    assert activation_bytes(shape(vocab_size=1), whole) == pytest.approx(
        kept + 10 * 2 * 0.7 * pair, abs=1
    )
    for name in ("hidden_size", "vocab_size", "experts_per_token"):
        assert activation_bytes(shape(**{name: None}), run) is None


def test_unpacked_experts_by_hand() -> None:
    one = 2048 * 1536 * 2
    run = RunOptions(quantization="nf4", kernel="ragged")
    assert unpacked_bytes(LAYER, run) == one
    grouped = dataclasses.replace(run, kernel="grouped")
    assert unpacked_bytes(LAYER, grouped) == 128 * one  # 768 MiB
    in_float32 = dataclasses.replace(grouped, base_dtype="float32")
    assert unpacked_bytes(LAYER, in_float32) == GROUP_BYTES // (2 * one) * 2 * one
    huge = LayerShape(0, 4, {"up_proj": (2**15, 2**15)})
    assert unpacked_bytes(huge, grouped) == 2**31
    assert unpacked_bytes(LAYER, dataclasses.replace(run, quantization="mxfp4")) == 2 * one


def test_what_a_token_takes_is_read_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    read = read_model_config(tmp_path)
    assert (read.hidden_size, read.vocab_size, read.experts_per_token) == (2048, 151936, 8)
    odd = token_sizes({"d_model": 8, "vocab_size": True, "moe_topk": [1, 2], "moe_k": 3})
    assert odd == {"hidden_size": 8, "vocab_size": None, "experts_per_token": 3}
    with pytest.raises(LayoutError, match="vocab_size is -5; accepted: whole numbers from 0 to"):
        token_sizes({"vocab_size": -5})


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Any:
    """Return a function that runs ``drlora plan`` on a file; the text of both streams."""
    pytest.importorskip("typer")
    from drlora_core.cli import main
    from drlora_core.cli import plan as command

    monkeypatch.setattr(command, "_load_reader", lambda: None)
    monkeypatch.delenv("COLUMNS", raising=False)  # workers of pytest-xdist have it
    path = tmp_path / "config.json"

    def run(values: dict[str, Any], *arguments: object) -> str:
        path.write_text(json.dumps(values))
        with pytest.raises(SystemExit):
            main(["plan", str(path), *map(str, arguments)])
        return " ".join("".join(capsys.readouterr()).split())

    return run


def test_plan_shows_the_memory_of_the_run(plan: Any) -> None:
    text = plan(QWEN, "--quantization", "nf4", "--kernel", "ragged", "--tokens", 128)
    assert "Memory of the run" in text
    assert "│ expert weights │ nf4, double quantization │ 13.93 GiB │" in text
    assert "│ rest of the base │ bfloat16 │ - │" in text
    assert "only the fields of config.json were read" in text
    assert "kernel ragged: one expert at a time │ 6.00 MiB" in text
    assert "estimate, 128 tokens, with gradient checkpointing" in text
    text = plan(QWEN, "--base-dtype", "float32", "--no-checkpointing")
    assert "│ expert weights │ float32 │ 108.00 GiB │" in text
    assert "unpacked experts" not in text
    assert "2,048 tokens, without gradient checkpointing" in text
    text = plan({key: QWEN[key] for key in QWEN if key != "vocab_size"}, "--quantization", "fp8")
    assert "│ expert weights │ fp8 │" in text
    assert "│ without" not in text
    assert "Activations are not counted" in text


def test_json_has_all_of_the_memory(plan: Any) -> None:
    values = json.loads(plan(QWEN, "--quantization", "mxfp4", "--dtype", "bfloat16", "--json"))
    memory = values["memory"]
    assert memory["experts"] == 48 * 128 * 3 * 2048 * 768 // 32 * 17
    assert memory["rest"] is None
    assert memory["options"]["lora_dtype"] == "bfloat16"
    known = ("experts", "lora", "gradients", "optimizer", "unpacked", "activations")
    assert memory["total"] == sum(memory[name] for name in known)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "nf5"], "accepted: none, nf4, fp4, fp8, mxfp4; did you mean 'nf4'?"),
        (["--quantization", "x"], "--quantization x: accepted: none, nf4, fp4, fp8, mxfp4"),
        (["--base-dtype", "bfloat"], "did you mean 'bfloat16'"),
        (
            ["--kernel", "group"],
            "--kernel group: accepted: grouped, ragged; did you mean 'grouped'",
        ),
        (["--tokens", "0"], "--tokens: "),
    ],
)
def test_unknown_choices_are_named(plan: Any, arguments: list[str], message: str) -> None:
    assert message in plan(QWEN, *arguments)
