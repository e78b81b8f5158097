"""Fine-tune a mixture-of-experts model with dynamic ranks: ``drlora finetune``."""
