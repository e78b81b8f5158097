"""Dynamic ranks with the Trainer of Transformers: attach, then train as usual.

The callback is optional. It logs the ranks and saves the adapter in every checkpoint.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.embedded import MODEL_DIR, TRAIN_FILE
from drlora_torch.integrations.trainer import DRLoRACallback

STEPS = 20


def load_rows(tokenizer: AutoTokenizer) -> Dataset:
    """Tokenize the task that ships with drlora, padded to one length."""
    rows = Dataset.from_json(str(TRAIN_FILE)).select(range(320))

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        encoded = tokenizer(
            row["prompt"] + row["completion"], padding="max_length", max_length=48, truncation=True
        )
        pairs = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        return {**encoded, "labels": [token if real else -100 for token, real in pairs]}

    return rows.map(tokenize, remove_columns=rows.column_names)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    rows = load_rows(AutoTokenizer.from_pretrained(MODEL_DIR))
    config = AllocatorConfig.for_training(STEPS, r_target=4, r_max=12)
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        )
        callback = DRLoRACallback(adapter)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        adapter.save_pretrained(Path(folder) / "adapter")
    for name, ranks in adapter.ranks().items():
        print(name, ranks.tolist())
    print("skipped steps:", adapter.skipped_steps)


if __name__ == "__main__":
    main()
