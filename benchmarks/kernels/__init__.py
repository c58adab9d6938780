"""Grouped adapters: ``python -m benchmarks.kernels`` for the report, ``pytest`` here for pytest-benchmark."""
