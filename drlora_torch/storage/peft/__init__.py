"""Adapters in the formats of others: PEFT directories, and one LoRA per expert and projection."""
