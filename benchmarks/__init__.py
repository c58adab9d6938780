"""Benchmarks: one module for each question, one result format, peers measured in the same run.

``python -m benchmarks.mixed``, ``.plot`` and ``.kernels`` write JSON below ``benchmarks/results``;
``python -m benchmarks.report`` makes ``docs/results.md`` of it. ``--quick`` proves that a benchmark runs; its
figures are marked as such.
"""
