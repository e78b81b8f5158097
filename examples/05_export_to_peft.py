"""Train with dynamic ranks, export to PEFT, and load the export without drlora.

A second process imports only transformers and peft. It computes the same logits and answers the
prompt.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.embedded import MODEL_DIR

TEXT = "12+34="
WITH_PEFT = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, text, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(text, return_tensors="pt")
answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
print("served with PEFT alone:", tokenizer.decode(answer[0]))
with torch.no_grad():
    save_file({"logits": model(**batch).logits}, output)
"""


def train(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> drlora_torch.Adapter:
    """Train for a few steps, to have something to export; 01 has a complete loop."""
    config = AllocatorConfig(
        r_init=2,
        r_target=4,
        r_max=12,
        warmup_steps=2,
        growth_interval=2,
        growth_end=6,
    )
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    for step in range(1, 9):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {loss.item():.3f}")
    return adapter


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    batch = AutoTokenizer.from_pretrained(MODEL_DIR)(TEXT, return_tensors="pt")
    model.train()
    adapter = train(model, batch)
    for name, ranks in adapter.ranks().items():
        print(name, ranks.tolist())
    print("skipped steps:", adapter.skipped_steps)
    model.eval()
    with torch.no_grad():
        ours = model(**batch).logits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = adapter.export_peft(folder / "peft")
        print("rank per layer:", list(report.ranks.values()))
        smaller = adapter.export_peft(folder / "peft_rank_4", rank=4)
        print(f"compressed to rank 4: largest error of an expert {smaller.largest_error:.1%}")
        arguments = [MODEL_DIR, folder / "peft", TEXT, folder / "logits"]
        command = [sys.executable, "-W", "ignore", "-c", WITH_PEFT, *map(str, arguments)]
        subprocess.run(command, check=True)
        theirs = load_file(folder / "logits")["logits"]
    print(f"largest difference between logits: {(ours - theirs).abs().max():.1e}")


if __name__ == "__main__":
    main()
