"""Does it work? The claims of DR-LoRA, measured: methods x tasks x seeds x learning rates."""
