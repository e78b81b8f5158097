"""Models of four families times eight formats of data, through the commands that a user types."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from drlora_core.cli import main
from drlora_torch.finetune import folder
from tests.finetune.conftest import make_tokenizer
from tests.finetune.test_finetune import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
    ),
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES = {
    "olmoe": lambda size: OlmoeConfig(
        intermediate_size=24, num_experts=8, vocab_size=size, **SHAPE
    ),
    "mixtral": lambda size: MixtralConfig(
        intermediate_size=24, num_local_experts=8, vocab_size=size, **SHAPE
    ),
    "qwen3_moe": lambda size: Qwen3MoeConfig(
        moe_intermediate_size=24, intermediate_size=48, num_experts=8, head_dim=16,
        vocab_size=size, **SHAPE,
    ),
    "gpt_oss": lambda size: GptOssConfig(
        intermediate_size=32, num_local_experts=8, head_dim=16, vocab_size=size, **SHAPE
    ),
}  # fmt: skip
SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(5)]


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_folder(file: Path, rows: list[dict[str, Any]]) -> None:
    file.mkdir()
    write_lines(file / "train.jsonl", rows[5:])
    write_lines(file / "test.jsonl", rows[:5])


FORMATS: dict[str, tuple[str, Any, Any, list[str]]] = {
    "pairs": ("a.jsonl", write_lines, lambda q, a: {"prompt": q, "completion": a}, []),
    "text": (
        "a.txt",
        lambda file, rows: file.write_text("\n\n".join(row["text"] for row in rows)),
        lambda q, a: {"text": q + a},
        ["--packing"],
    ),
    "questions": (
        "a.csv",
        write_csv,
        lambda q, a: {"ask": q, "reply": a},
        ["--columns", "prompt=ask,completion=reply"],
    ),
    "messages": ("a.jsonl.gz", write_lines, lambda q, a: {"messages": talk(q, a)}, []),
    "share_gpt": (
        "a.json",
        lambda file, rows: file.write_text(json.dumps(rows)),
        lambda q, a: {
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
        },
        ["--streaming", "--eval-data", "{data}"],
    ),
    "instructions": (
        "a.parquet",
        lambda file, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file),
        lambda q, a: {"instruction": "add", "input": q, "output": a},
        ["--attention-rank", "2", "--router", "trainable"],
    ),
    "folder": ("a", write_folder, lambda q, a: {"question": q, "answer": a}, []),
    "preferences": (
        "a.jsonl",
        write_lines,
        lambda q, a: {"prompt": q, "chosen": a, "rejected": "?"},
        ["--method", "dpo"],
    ),
}
QUICK: dict[str, Any] = {
    "batch-size": 4,
    "r-init": 1,
    "r-target": 2,
    "r-max": 4,
    "learning-rate": 1e-2,
    "max-length": 40,
    "lr-scheduler": "constant",
    "growth-end": 2,
    "warmup-steps": 0,
    "growth-interval": 1,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(place / name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(make(len(tokenizer)))
            for parameter in model.parameters():  # gpt-oss leaves some as they were
                if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e3:
                    parameter.data.zero_()
        model.save_pretrained(place / name)
    return place


def drlora(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert not stopped.value.code


IN_CI = {
    "olmoe": "text",
    "qwen3_moe": "messages",
    "mixtral": "preferences",
    "gpt_oss": "instructions",
}
"""Each family once, with the formats that need options; test_formats.py reads all formats."""
PAIRS = [
    pytest.param(family, data, marks=[] if data == IN_CI[family] else [pytest.mark.exhaustive])
    for family in FAMILIES
    for data in FORMATS
]


@pytest.mark.parametrize(("family", "data"), PAIRS)
def test_a_model_is_tuned_resumed_asked_merged_and_reported(
    family: str, data: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, write, row, options = FORMATS[data]
    file = tmp_path / name
    write(file, [row(*each) for each in SUMS])
    words = [word.format(data=file) for word in options]
    quick = [f"--{name}={value}" for name, value in QUICK.items()]
    common = ["finetune", str(models / family), str(file), *quick, *words]
    whole, run = tmp_path / "whole", tmp_path / "run"
    drlora(*common, "--steps", "6", "--save-every", "3", "--output", str(whole))
    drlora(*common, "--steps", "3", "--save-every", "3", "--output", str(run))
    drlora("finetune", "--resume", str(run), "--steps", "6")
    assert losses(run) == losses(whole)
    first, second = (json.loads((r / folder.RESULT).read_text())[0] for r in (whole, run))
    for same in ("loss_after", "ranks", "total_rank"):
        assert first[same] == second[same]
    assert first["total_rank"] == first["budget"] == 32
    repeated = tmp_path / "again"
    drlora("finetune", "--config", str(whole / folder.RECIPE), "--output", str(repeated))
    assert losses(repeated) == losses(whole)
    capsys.readouterr()
    drlora("generate", str(run), "1+1=", "--max-new-tokens", "4")
    assert capsys.readouterr().out
    drlora("merge", str(run))
    merged = AutoModelForCausalLM.from_pretrained(run / folder.MERGED)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    drlora("report", str(run))
    assert (run / "report.html").stat().st_size > 1000
