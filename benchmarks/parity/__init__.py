"""Do several processes decide as one? Every way to spread a model against one process, in float64.

``python -m benchmarks.parity`` writes docs/parity.md. The tests run the same modes for fewer steps.
"""
