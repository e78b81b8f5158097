"""Fuzzing of every reader: see `python -m scripts.fuzz --help`."""
