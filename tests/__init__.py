"""Tests of drlora; run ``pytest`` in the repository."""
