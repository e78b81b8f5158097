"""Tests of drlora_core; none needs torch."""
