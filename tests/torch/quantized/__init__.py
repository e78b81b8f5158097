"""Experts in 4 bits: formats, kernels, refusals and loading."""
