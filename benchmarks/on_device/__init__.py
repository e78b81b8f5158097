"""The parts of :mod:`benchmarks.gpu`."""
