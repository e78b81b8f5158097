"""Peak memory of a load that packs: the packed model, and less than one layer of experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.torch.quantized import checkpoints

EXPERTS, WIDTH, INNER, LAYERS = 32, 512, 256, 6
LAYER_BYTES = EXPERTS * 3 * WIDTH * INNER * 2
CHILD = """
import json, sys, threading, time
import torch, drlora_torch
from transformers import AutoModelForCausalLM

def anonymous():  # bytes; the mapped pages of the checkpoint do not count
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peaks.append(anonymous())
        time.sleep(0.0005)

torch.set_num_threads(1)
packed = {"quantization_config": drlora_torch.Experts4bitConfig()}
arguments = packed if sys.argv[2] == "nf4" else {}
AutoModelForCausalLM.from_pretrained(sys.argv[3], **arguments)  # everything is imported now
before, peaks, done = anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **arguments)
done.set()
thread.join()
held = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps([max(peaks) - before, held]))
"""


def load(folder: Path, storage: str) -> tuple[int, int]:
    """Peak of a load and bytes of the loaded model, in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), storage, str(folder / "small")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, held = json.loads(said.splitlines()[-1])
    return peak, held


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_experts_of_more_than_a_layer_are_never_held_unpacked(tmp_path: Path) -> None:
    checkpoints.qwen3_moe().save_pretrained(tmp_path / "small")
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
    )
    model = checkpoints.build(transformers.Qwen3MoeForCausalLM, config)
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    peak, held = load(tmp_path, "nf4")
    assert held < 0.4 * LAYERS * LAYER_BYTES
    assert peak - held < LAYER_BYTES
    plain_peak, plain_held = load(tmp_path, "none")  # that the peak is seen at all
    assert plain_peak > plain_held > 0.95 * LAYERS * LAYER_BYTES
