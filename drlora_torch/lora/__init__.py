"""The LoRA of one experts module: rank slots, storage, and the products of a forward."""
