"""Kills and faults: ``python -m scripts.kills`` (docs/reliability.md).

A campaign does a piece of work in peace once, then again and again in children of this process that
are killed, or whose disk fails, and goes on the way a user would. What comes out must not differ.

``operations`` counts what a process does to files; ``children`` forks and kills; ``worlds`` makes
models and data; ``jobs`` and ``finetunes`` are the pieces of work; ``killing`` and ``faults`` are
the two campaigns.
"""
