"""Measures the claims of DR-LoRA: methods x tasks x seeds x learning rates."""
