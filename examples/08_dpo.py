"""Learn preferences with TRL's DPOTrainer; the base under the adapter is the reference model.

``BaseReference`` runs the trained model with its adapter switched off: no second model is loaded.
Takes about half a minute on two cores. ``drlora finetune --method dpo`` does the same from files.
"""

import json
import re
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.embedded import MODEL_DIR, TRAIN_FILE
from drlora_torch.integrations.trainer import DRLoRACallback
from drlora_torch.integrations.trl import BaseReference

STEPS, ROWS = 20, 8


def make_pairs() -> Dataset:
    """Prefer the right completion, ``6ty 1ka``, to an echo of the digits, ``6 1``."""
    rows = [json.loads(line) for line in TRAIN_FILE.read_text().splitlines()[: STEPS * ROWS]]
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": re.sub("[a-z]", "", row["completion"]),
            }
            for row in rows
        ]
    )


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    config = AllocatorConfig.for_training(STEPS, r_target=4, r_max=12)
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            beta=0.1,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-3,
            router_aux_loss_coef=0.0,  # the routers are frozen: nothing to balance
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        )
        trainer = DPOTrainer(
            model,
            ref_model=BaseReference(adapter),
            args=arguments,
            train_dataset=make_pairs(),
            processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
            callbacks=[DRLoRACallback(adapter)],
        )
        trainer.train()

    for entry in trainer.state.log_history:
        if "rewards/margins" in entry:
            accuracy, margin = entry["rewards/accuracies"], entry["rewards/margins"]
            print(
                f"step {entry['step']:3d}  loss {entry['loss']:.3f}"
                f"  preferred {accuracy:.0%}  margin {margin:.2f}"
            )
    for name, ranks in adapter.ranks().items():
        print(name, ranks.tolist())
    print("skipped steps:", adapter.skipped_steps)


if __name__ == "__main__":
    main()
