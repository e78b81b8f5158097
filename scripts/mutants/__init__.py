"""Mutation tests of the core: are there tests that fail when its code is changed?

mutmut (its options are in pyproject.toml) makes the mutants. A mutated module holds all of its own,
and a name chooses one. The tests are collected once; each mutant runs in a fork of that process.
"""
