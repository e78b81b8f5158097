"""How an adapter enters a model, is switched on and off, and leaves."""
