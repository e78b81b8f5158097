"""Dynamic ranks on a base whose experts are in 4 bits. Takes about twenty seconds on two cores.

Needs bitsandbytes (``pip install "drlora[quantized]"``). ``quantize_experts`` packs the experts of
a model in memory. For models that do not fit into memory,
``from_pretrained(..., quantization_config=drlora_torch.Experts4bitConfig())`` packs while loading.
"""

import json
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.embedded import MODEL_DIR, TRAIN_FILE

STEPS, ROWS = 40, 16


def load_packed_model() -> torch.nn.Module:
    """Load the model that ships with drlora, and pack its experts in NF4."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    size = drlora_torch.quantize_experts(model)
    print(f"experts: {size.before:,} bytes unpacked, {size.after:,} bytes in NF4")
    return model


def make_batches(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, torch.Tensor]]:
    """Tokenize the task that ships with drlora; padding bears no loss."""
    rows = [json.loads(line) for line in TRAIN_FILE.read_text().splitlines()[: STEPS * ROWS]]
    texts = [row["prompt"] + row["completion"] for row in rows]
    batches = []
    for start in range(0, len(texts), ROWS):
        batch = dict(tokenizer(texts[start : start + ROWS], return_tensors="pt", padding=True))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    return batches


def main() -> None:
    model = load_packed_model()
    model.train()  # from_pretrained returns the model in evaluation mode
    batches = make_batches(AutoTokenizer.from_pretrained(MODEL_DIR))
    config = AllocatorConfig.for_training(STEPS, r_target=4, r_max=12)
    adapter = drlora_torch.attach(model, AllocatorEngine(config))  # LoRA in float32
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)

    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    for name, ranks in adapter.ranks().items():
        print(name, ranks.tolist())
    print("skipped steps:", adapter.skipped_steps)

    with tempfile.TemporaryDirectory() as folder:  # the adapter alone, a few hundred kB
        adapter.save_pretrained(folder)
        model.eval()
        with torch.no_grad():
            trained = model(**batches[0]).logits
            again = drlora_torch.load(load_packed_model().eval(), folder, trainable=False)
            loaded = again.model(**batches[0]).logits
    print(f"largest difference after loading: {(trained - loaded).abs().max():.1e}")


if __name__ == "__main__":
    main()
