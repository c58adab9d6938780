"""What is there for the day a GPU is there: ``python -m benchmarks.gpu.check`` and ``.bench``.

``check`` asks whether the kernels are right on the device; ``bench`` how fast they are, beside what a torch
user would do and beside vLLM's way. Each ends within 8 minutes, writes JSON below ``benchmarks/results/gpu``
and has a ``--dry`` mode, in which the emulator of the tests and Triton's interpreter stand in for the device:
everything runs, on tiny shapes, and nothing is measured.
"""
