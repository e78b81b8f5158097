"""The commands after runs of other kinds: packed experts, trained routers and heads, chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from drlora_torch.finetune import job
from drlora_torch.finetune.after.opened import open_run
from tests.finetune.after.conftest import Call
from tests.finetune.test_finetune import options_for
from tests.marks import slow_and_thinned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
    ),
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "all in 4 bits": {"load_in_4bit": True},
    "router and head": {"router": "trainable", "modules_to_save": ("lm_head",)},
    "bfloat16": {"dtype": "bfloat16"},
    "chat": {"chat_template": "template.jinja", "data": "chat.jsonl"},
}


@pytest.mark.parametrize("kind", slow_and_thinned(((kind,) for kind in KINDS), 2))
def test_every_kind_of_run_can_be_used(
    kind: str,
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("template.jinja").write_text(TEMPLATE)
    turns = [
        [{"role": "user", "content": f"{a}+1"}, {"role": "assistant", "content": str(a + 1)}]
        for a in range(60)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    changes = {"data": str(sums), "steps": 8, **KINDS[kind]}
    job.run(options_for(moe_folder, **changes), tmp_path / "run", Console(quiet=True))

    said = call("evaluate", "run", "--base", "--exact-match", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)["scores"]
    assert found["trained"]["loss"] < found["base"]["loss"]
    assert call("generate", "run", "3+1", "--max-new-tokens", 4).code == 0
    said = call("merge", "run")
    assert said.code == 0, said.err
    tokens = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected = open_run(tmp_path / "run").model(tokens).logits.float()
        merged = AutoModelForCausalLM.from_pretrained("run/merged")(tokens).logits.float()
    if kind != "all in 4 bits":  # its Linears are written unpacked, and compute in another type
        assert (merged - expected).norm() < 0.02 * expected.norm()
    packed = "4" in kind
    said = call("merge", "run", "--quantize", "--output", "packed")
    assert said.code == (0 if packed else 2)
    assert Path("packed").exists() is packed
