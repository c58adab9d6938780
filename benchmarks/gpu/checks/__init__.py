"""The programs of ``benchmarks.gpu.check``, a process each: what one breaks on the device, no other sees.

Each prints what it found in a last line and ends with 0, with 1 if it found something wrong, or with
:data:`SKIPPED` if it has nothing to say here.
"""

SKIPPED = 77
"""The exit status of a program that could not check anything, as automake has it."""
