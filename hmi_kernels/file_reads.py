"""Reading files while doing something else."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from hmi_kernels.native import native, native_reason
from hmi_kernels.read_files import check_reads, explain, read_by_python

__all__ = ["FileReads", "PendingRead", "prepare_reads", "set_read_latency", "start_reads"]

_WAITING, _UNDER_WAY, _ENDED = 0, 1, 2  # csrc/common/file_reads.h
_SECONDS_BETWEEN_SIGNALS = 0.1


class PendingRead(NamedTuple):
    """In place of an outcome: this read has not ended."""

    has_begun: bool
    """If so, for longer than is usual, it is stuck; if not, all threads are busy or stuck with others."""


class _Reads(Protocol):
    """What runs the reads: the compiled module, or :class:`_ReadsAtStart`."""

    def start(self) -> None: ...

    def wait(self, seconds: float) -> bool: ...

    def cancel(self) -> None: ...

    def progress(self) -> list[tuple[int, int, int, bool, float]]: ...

    @property
    def seconds(self) -> float: ...


class FileReads:
    """Reads that :func:`start_reads` has started or :func:`prepare_reads` has prepared. Thread-safe.

    The destinations stay in memory until every read has ended, even if this object is dropped: a read that is
    stuck must not write into memory that belongs to somebody else by then. Their tensors are let go when
    :meth:`wait` has returned True; of a dropped object by the next call of :func:`start_reads` or
    :meth:`PinnedPool.empty`, or when other reads are waited for or dropped. Until then they must be neither
    read nor written, nor resized. To drop the object also cancels reads that have not begun.

    After ``os.fork()`` the reads go on in the parent. In the child, methods raise RuntimeError, except for
    :meth:`cancel`, which does nothing.
    """

    def __init__(self, reads: _Reads, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Use :func:`start_reads` or :func:`prepare_reads`."""
        self._reads = reads
        self._names = names
        self._sizes = sizes

    def start(self) -> None:
        """Starts prepared reads, and returns. Where Ctrl-C ends this, those that have begun go on.

        Raises RuntimeError if they were started before, and if there is no thread to be had: they are
        cancelled then.
        """
        self._reads.start()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits until all reads have ended, without the interpreter's lock; returns whether they have.

        In the main thread signals are handled meanwhile: Ctrl-C ends it. Reads that are not started do not
        end, unless they are cancelled.

        Args:
            timeout_seconds: return after so long at the latest; 0 to look only; None to wait however long.

        Raises ValueError if it is negative.
        """
        seconds = math.inf if timeout_seconds is None else timeout_seconds
        if not seconds >= 0:
            raise ValueError(f"timeout_seconds must not be negative, but is {timeout_seconds}")
        # Only the main thread handles signals. Others sleep on: to wake up while the interpreter shuts down
        # would crash it.
        if threading.current_thread() is not threading.main_thread():
            return self._reads.wait(seconds)
        deadline = time.monotonic() + seconds
        while not self._reads.wait(min(seconds, _SECONDS_BETWEEN_SIGNALS)):
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return False
        return True

    @property
    def pending(self) -> list[int]:
        """The numbers of the reads that have not ended."""
        return [number for number, each in enumerate(self._reads.progress()) if each[0] != _ENDED]

    def outcomes(self) -> list[OSError | EOFError | ValueError | PendingRead | None]:
        """For each file what :func:`read_files` returns, or :class:`PendingRead` as long as it has not ended.

        None, and nothing else, says that the file is in its tensor. A read that :meth:`cancel` has kept from
        beginning is an OSError with ``errno.ECANCELED``.
        """
        progress = zip(self._names, self._sizes, self._reads.progress(), strict=True)
        return [
            explain(name, size, (error, bytes_read, is_finite))
            if stage == _ENDED
            else PendingRead(has_begun=stage == _UNDER_WAY)
            for name, size, (stage, error, bytes_read, is_finite, _) in progress
        ]

    def cancel(self) -> None:
        """Ends the reads that have not begun; those that have go on. Does nothing the second time."""
        self._reads.cancel()

    @property
    def seconds(self) -> float:
        """From the start to the end of the last read, of those that have ended so far; 0 before."""
        return self._reads.seconds

    @property
    def seconds_each(self) -> list[float | None]:
        """How long each read took, from its own beginning; None as long as it has not ended."""
        return [each[-1] if each[0] == _ENDED else None for each in self._reads.progress()]


def prepare_reads(
    paths: Sequence[str | os.PathLike[str]],
    file_offsets: Sequence[int],
    destinations: Sequence[Tensor],
    *,
    num_threads: int = 8,
    require_finite: bool = False,
) -> FileReads:
    """What :func:`start_reads` does but for the start, which :meth:`FileReads.start` makes up for.

    For those who must know of reads that go on when an exception ends :func:`start_reads` before it has
    returned them: a signal that comes meanwhile is handled just then.

    Raises ValueError and TypeError as :func:`read_files` does.
    """
    check_reads(paths, file_offsets, destinations, num_threads, require_finite)
    names = [os.fspath(path) for path in paths]
    sizes = [tensor.nbytes for tensor in destinations]
    if native_reason:
        return FileReads(_ReadsAtStart(names, file_offsets, destinations, require_finite), names, sizes)
    reads = native.FileReads(
        [os.fsencode(name) for name in names],
        list(file_offsets),
        sizes,
        [tensor.data_ptr() for tensor in destinations],
        require_finite,
        num_threads,
        tuple(destinations),
    )
    return FileReads(reads, names, sizes)


def start_reads(
    paths: Sequence[str | os.PathLike[str]],
    file_offsets: Sequence[int],
    destinations: Sequence[Tensor],
    *,
    num_threads: int = 8,
    require_finite: bool = False,
) -> FileReads:
    """Starts what :func:`read_files` does, and returns.

    The files are read by threads of their own, which sleep while there is nothing to read. A thread is
    started when none is free, up to 256 in the process. A read that is stuck (a dead server's, a dying
    disk's) holds up one of them; the other files come in, those of the same call and of others.

    Where the compiled module is missing, the files are read before this returns.

    Args:
        paths: files.
        file_offsets: the first byte wanted of each.
        destinations: contiguous CPU tensors, one a file, that share no memory with one another or with those
            of reads that have not ended; as many bytes are read as each has.
        num_threads: most files read at a time for this call. A file that has been read for more than a second
            no longer counts.
        require_finite: look at what was read, as float32, while it is in the processor's cache.

    Raises ValueError and TypeError as :func:`read_files` does; RuntimeError if there is no thread to be had.
    """
    reads = prepare_reads(
        paths, file_offsets, destinations, num_threads=num_threads, require_finite=require_finite
    )
    reads.start()
    return reads


def set_read_latency(seconds_per_read: float, bytes_per_second: float | None = None) -> None:
    """Makes the disk slower for all reads of this process. For tests and benchmarks only.

    From now on each read of :func:`read_files` and :func:`start_reads` sleeps in the thread that reads, after
    it has read, as if one disk answered after ``seconds_per_read`` and then delivered ``bytes_per_second``.
    Reads at the same time wait for their answers together, and share the bandwidth. ``set_read_latency(0)``
    switches it off, as it is at the start; reads that sleep sleep on.

    Raises ValueError unless ``seconds_per_read`` is 0 to 3600 and ``bytes_per_second`` 1 or more, or None for
    as fast as the real disk is; RuntimeError where the compiled module is missing.
    """
    native.set_read_latency(seconds_per_read, math.inf if bytes_per_second is None else bytes_per_second)


class _ReadsAtStart:
    """Reads where the compiled module is missing: all of them at the start, one after the other."""

    def __init__(
        self, names: Sequence[str], offsets: Sequence[int], tensors: Sequence[Tensor], require_finite: bool
    ) -> None:
        self._reads = list(zip(names, offsets, tensors, strict=True))
        self._require_finite = require_finite
        self._progress: list[tuple[int, int, int, bool, float]] = [(_WAITING, 0, 0, True, 0.0)] * len(names)
        self._is_started = False
        self.seconds = 0.0

    def start(self) -> None:
        if self._is_started:
            raise RuntimeError("these reads have been started before")
        self._is_started = True
        start = time.monotonic()
        for number, (name, offset, tensor) in enumerate(self._reads):
            if self._progress[number][0] == _ENDED:  # cancelled
                continue
            began = time.monotonic()
            outcome = read_by_python(name, offset, tensor, self._require_finite)
            self._progress[number] = (_ENDED, *outcome, time.monotonic() - began)
        self.seconds = time.monotonic() - start

    def wait(self, seconds: float) -> bool:
        return all(each[0] == _ENDED for each in self._progress)

    def cancel(self) -> None:
        canceled = (_ENDED, errno.ECANCELED, 0, True, 0.0)
        self._progress = [canceled if each[0] == _WAITING else each for each in self._progress]

    def progress(self) -> list[tuple[int, int, int, bool, float]]:
        return self._progress
