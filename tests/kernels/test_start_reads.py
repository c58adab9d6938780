"""Reads in the background equal plain ones; one that is stuck holds up nobody, and its memory stays."""

from __future__ import annotations

import errno
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmi_kernels import PendingRead, PinnedPool, PoolExhaustedError, prepare_reads, read_files, start_reads

LONG = 60.0
"""Seconds that nothing here takes unless it hangs."""


@pytest.fixture(params=["compiled", "python"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(sys.modules["hmi_kernels.file_reads"], "native_reason", "for this test")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it never comes true"
        time.sleep(0.005)


class StuckFile:
    """A named pipe: to open it for reading takes until :meth:`release`. It cannot be read at an offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_stuck = True
        os.mkfifo(path)

    def release(self) -> None:
        """Waits for a reader, and lets it go."""
        until(self._try_to_release)

    def release_if_read(self) -> None:
        if self.is_stuck:
            self._try_to_release()

    def _try_to_release(self) -> bool:
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO  # nobody reads yet
            return False
        self.is_stuck = False
        return True


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Callable[[str], StuckFile]]:
    """Makes stuck files, and leaves no thread behind that hangs on one."""
    made = []

    def stick(name: str) -> StuckFile:
        made.append(StuckFile(tmp_path / name))
        return made[-1]

    yield stick
    for each in made:
        each.release_if_read()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def empty(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


class Case(NamedTuple):
    """What a file holds and what is wanted of it."""

    kind: str
    size: int
    """Float32 values wanted."""
    offset: int


CASES = st.builds(
    Case,
    st.sampled_from(["good", "good", "missing", "folder", "short", "nan", "infinite"]),
    st.integers(1, 60_000),
    st.integers(0, 5000),
)


def make_file(path: Path, case: Case) -> None:
    values = torch.randn(case.size)
    if case.kind in ("nan", "infinite"):
        values[int(torch.randint(case.size, ()))] = math.nan if case.kind == "nan" else -math.inf
    content = os.urandom(case.offset) + values.numpy().tobytes()
    if case.kind == "folder":
        path.mkdir()
    elif case.kind == "short":
        path.write_bytes(content[:-1])
    elif case.kind != "missing":
        path.write_bytes(content + b"beyond")


def read_by_hand(path: Path, case: Case) -> bytes | type[Exception]:
    try:
        with path.open("rb") as file:
            file.seek(case.offset)
            content = file.read(4 * case.size)
    except OSError as error:
        return type(error)
    if len(content) < 4 * case.size:
        return EOFError
    values = torch.frombuffer(bytearray(content), dtype=torch.float32)
    return content if bool(torch.isfinite(values).all()) else ValueError


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases=st.lists(CASES, max_size=14), num_threads=st.integers(1, 9))
def test_outcomes_and_bytes_are_those_of_plain_reads(
    implementation: None, tmp_path_factory: pytest.TempPathFactory, cases: list[Case], num_threads: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(number) for number in range(len(cases))]
    for path, case in zip(paths, cases, strict=True):
        make_file(path, case)
    tensors = [torch.empty(case.size) for case in cases]
    offsets = [case.offset for case in cases]
    reads = start_reads(paths, offsets, tensors, num_threads=num_threads, require_finite=True)
    assert reads.wait()
    assert reads.pending == []
    for path, case, tensor, outcome in zip(paths, cases, tensors, reads.outcomes(), strict=True):
        expected = read_by_hand(path, case)
        if isinstance(expected, bytes):
            assert outcome is None
            assert tensor.numpy().tobytes() == expected
        else:
            assert type(outcome) is expected
            assert str(path) in str(outcome)
    assert len(reads.seconds_each) == len(cases)
    assert all(seconds is not None and 0 <= seconds <= reads.seconds for seconds in reads.seconds_each)
    again = read_files(paths, offsets, tensors, num_threads=num_threads, require_finite=True)
    assert list(map(repr, again)) == list(map(repr, reads.outcomes()))


def test_wrong_arguments_are_refused_before_anything_is_read(implementation: None, tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"12345678")
    tensor = torch.zeros(2)
    for arguments, keywords, error in (
        (([path], [0], []), {}, ValueError),
        (([path], [-1], [tensor]), {}, ValueError),
        (([path], [0], [tensor]), {"num_threads": 0}, ValueError),
        (([path], [0], [torch.zeros(4, 4).t()[:2]]), {}, ValueError),
        (([path], [0], [torch.zeros(2, device="meta")]), {}, TypeError),
        (([path], [0], [tensor.long()]), {"require_finite": True}, TypeError),
    ):
        with pytest.raises(error):
            start_reads(*arguments, **keywords)
    reads = start_reads([path], [0], [torch.zeros(2)])
    for timeout in (-1, math.nan):
        with pytest.raises(ValueError, match="timeout_seconds must not be negative"):
            reads.wait(timeout)
    assert tensor.tolist() == [0, 0]
    nothing = start_reads([], [], [])
    assert nothing.wait(0) and nothing.outcomes() == nothing.pending == nothing.seconds_each == []


def test_prepared_reads_wait_for_their_start(implementation: None, tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"abcd")
    tensors = [empty(4), empty(4)]
    started, canceled = (prepare_reads([path], [0], [tensor]) for tensor in tensors)
    for reads in (started, canceled):
        assert not reads.wait(0.01) and reads.pending == [0]
        assert reads.outcomes() == [PendingRead(has_begun=False)] and reads.seconds_each == [None]
    canceled.cancel()
    for reads in (started, canceled):
        reads.start()
        assert reads.wait()
        with pytest.raises(RuntimeError, match="have been started before"):
            reads.start()
    assert [bytes(tensor.tolist()) for tensor in tensors] == [b"abcd", bytes(4)]
    assert started.outcomes() == [None]
    (outcome,) = canceled.outcomes()
    assert isinstance(outcome, OSError) and outcome.errno == errno.ECANCELED


def test_a_stuck_read_trips_the_time_out_and_the_others_come_in(
    stick: Callable[[str], StuckFile], tmp_path: Path
) -> None:
    stuck = stick("stuck")
    paths = [write(tmp_path / str(number), bytes([number]) * 90_000) for number in range(5)]
    tensors = [empty(90_000) for _ in range(6)]
    reads = start_reads([stuck.path, *paths], [0] * 6, tensors, num_threads=2)
    until(lambda: reads.pending == [0])
    began = time.monotonic()
    assert not reads.wait(0.2)
    assert time.monotonic() - began >= 0.2
    assert reads.outcomes() == [PendingRead(has_begun=True), *[None] * 5]
    assert reads.seconds_each[0] is None
    for number, tensor in enumerate(tensors[1:]):
        assert bool((tensor == number).all())
    others = start_reads(paths, [0] * 5, [empty(90_000) for _ in paths], num_threads=2)
    assert others.wait(LONG) and others.outcomes() == [None] * 5
    stuck.release()
    assert reads.wait(LONG) and reads.pending == []
    (error, *rest) = reads.outcomes()
    assert isinstance(error, OSError) and error.errno == errno.ESPIPE and rest == [None] * 5
    assert reads.seconds >= reads.seconds_each[0] >= 0.2


def test_num_threads_is_kept_until_a_read_is_stuck(stick: Callable[[str], StuckFile], tmp_path: Path) -> None:
    stuck = [stick(f"stuck {number}") for number in range(3)]
    path = write(tmp_path / "f", b"abcd")
    tensors = [empty(4) for _ in range(5)]
    reads = start_reads([*(each.path for each in stuck), path, path], [0] * 5, tensors, num_threads=2)
    until(lambda: reads.pending == [0, 1, 2])
    assert reads.seconds >= 1, "no read counts as stuck before"
    assert reads.outcomes() == [PendingRead(has_begun=True)] * 3 + [None] * 2
    assert [bytes(tensor.tolist()) for tensor in tensors[3:]] == [b"abcd"] * 2
    for each in stuck:
        each.release()
    assert reads.wait(LONG)


def test_jobs_go_on_beside_many_stuck_ones(stick: Callable[[str], StuckFile], tmp_path: Path) -> None:
    stuck = [stick(f"stuck {number}").path for number in range(40)]
    held_up = [
        start_reads(stuck[begin : begin + 8], [0] * 8, [empty(1) for _ in range(8)])
        for begin in range(0, 40, 8)
    ]
    paths = [write(tmp_path / str(number), bytes([number]) * 1000) for number in range(20)]
    for _ in range(3):
        tensors = [empty(1000) for _ in paths]
        reads = start_reads(paths, [0] * 20, tensors)
        assert reads.wait(LONG) and reads.outcomes() == [None] * 20
        assert [int(tensor[-1]) for tensor in tensors] == list(range(20))
        assert read_files(paths, [0] * 20, [empty(1000) for _ in paths]) == [None] * 20
    assert [reads.pending for reads in held_up] == [list(range(8))] * 5


def test_many_threads_start_and_wait_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(number), bytes([number]) * 30_000) for number in range(8)]

    def read_some(seed: int) -> None:
        for round in range(10):
            tensors = [empty(30_000) for _ in paths]
            parts = [tensor[seed:] for tensor in tensors]
            reads = start_reads(paths, [seed] * 8, parts, num_threads=1 + seed % 4)
            if round == 4:
                reads.cancel()
            while not reads.wait(0.001):
                assert set(reads.pending) <= set(range(8))
            for number, (tensor, outcome) in enumerate(zip(tensors, reads.outcomes(), strict=True)):
                if outcome is None:
                    assert bool((tensor[seed:] == number).all())
                else:
                    assert round == 4 and isinstance(outcome, OSError) and outcome.errno == errno.ECANCELED
                    assert not tensor.any()

    with ThreadPoolExecutor(12) as executor:
        list(executor.map(read_some, range(24)))


def test_several_threads_wait_for_the_same_reads(stick: Callable[[str], StuckFile]) -> None:
    stuck = stick("stuck")
    reads = start_reads([stuck.path], [0], [empty(1)])
    with ThreadPoolExecutor(4) as executor:
        waiting = [executor.submit(reads.wait, timeout) for timeout in (LONG, None, LONG, None)]
        # They wait without the interpreter's lock, or this thread would not get here.
        stuck.release()
        assert [each.result(LONG) for each in waiting] == [True] * 4


def test_canceled_reads_never_begin(stick: Callable[[str], StuckFile], tmp_path: Path) -> None:
    stuck = stick("stuck")
    path = write(tmp_path / "f", b"abcd")
    tensors = [empty(4) for _ in range(3)]
    reads = start_reads([stuck.path, path, path], [0] * 3, tensors, num_threads=1)
    until(lambda: reads.outcomes()[0] == PendingRead(has_begun=True))
    assert reads.outcomes()[1:] == [PendingRead(has_begun=False)] * 2
    reads.cancel()
    assert reads.pending == [0] and not reads.wait(0)
    for outcome in reads.outcomes()[1:]:
        assert isinstance(outcome, OSError) and outcome.errno == errno.ECANCELED
        assert outcome.filename == str(path)
    stuck.release()
    assert reads.wait(LONG)
    reads.cancel()
    numbers = [getattr(each, "errno", None) for each in reads.outcomes()]
    assert numbers == [errno.ESPIPE, errno.ECANCELED, errno.ECANCELED]
    assert not any(tensor.any() for tensor in tensors)


def test_memory_stays_while_a_read_is_stuck_and_goes_after(
    stick: Callable[[str], StuckFile], tmp_path: Path
) -> None:
    stuck = stick("stuck")
    never_read = empty(4)
    tensor = empty(1000)
    memory = weakref.ref(tensor)
    paths = [stuck.path, write(tmp_path / "f", b"abcd")]
    reads = [start_reads(paths, [0, 0], [tensor, never_read], num_threads=1)]
    until(lambda: reads[0].outcomes()[0] == PendingRead(has_begun=True))
    reads.clear()
    del tensor
    gc.collect()
    assert start_reads([], [], []).wait()
    assert memory() is not None
    stuck.release()

    def is_gone() -> bool:
        start_reads([], [], [])
        return memory() is None

    until(is_gone)
    assert not never_read.any(), "a dropped read that had not begun never does"


def test_memory_goes_when_all_is_read_though_the_object_stays(tmp_path: Path) -> None:
    tensor = empty(4)
    memory = weakref.ref(tensor)
    reads = start_reads([write(tmp_path / "f", b"abcd")], [0], [tensor])
    assert reads.wait()
    assert bytes(tensor.tolist()) == b"abcd"
    del tensor
    assert memory() is None
    assert reads.outcomes() == [None]


def test_a_pool_gets_the_memory_of_a_stuck_read_back(stick: Callable[[str], StuckFile]) -> None:
    stuck = stick("stuck")
    with PinnedPool(4096) as pool:
        reads = [start_reads([stuck.path], [0], [pool.empty(1024)])]
        until(lambda: reads[0].outcomes() == [PendingRead(has_begun=True)])
        reads.clear()

        def gives_memory() -> bool:
            try:
                pool.empty(1024)
            except PoolExhaustedError:
                return False
            return True

        assert not gives_memory()
        stuck.release()
        until(gives_memory)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where tests were started in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_signals_end_the_main_threads_wait(stick: Callable[[str], StuckFile]) -> None:
    reads = start_reads([stick("stuck").path], [0], [empty(1)])
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        reads.wait(LONG)
    assert time.monotonic() - began < LONG / 2, "the signal was handled only after the wait"
    timer.join()
    assert reads.pending == [0]


def status_of_child(code: Callable[[], object]) -> int:
    """Runs it in a fork, which is killed if it hangs; 0 if it returns."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONG))
        try:
            code()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_starts_anew(stick: Callable[[str], StuckFile], tmp_path: Path) -> None:
    stuck = stick("stuck")
    path = write(tmp_path / "f", b"abcd")
    of_parent = [start_reads([stuck.path, path], [0, 0], [empty(4), empty(4)])]
    until(lambda: of_parent[0].pending == [0])

    def child() -> None:
        tensor = empty(4)
        reads = start_reads([path] * 20, [0] * 20, [tensor, *(empty(4) for _ in range(19))])
        assert reads.wait() and reads.outcomes() == [None] * 20
        assert bytes(tensor.tolist()) == b"abcd"
        for forbidden in (of_parent[0].wait, of_parent[0].outcomes):
            with pytest.raises(RuntimeError, match="started before fork"):
                forbidden()
        of_parent[0].cancel()
        of_parent.clear()

    assert status_of_child(child) == 0
    stuck.release()
    assert of_parent[0].wait(LONG)


def test_forks_while_reads_are_under_way(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(number), bytes([number]) * 300_000) for number in range(8)]
    is_over = threading.Event()

    def read() -> None:
        # torch fills a tensor of this size with OpenMP, which hangs in a child whose parent has used it.
        tensors = [torch.frombuffer(bytearray(300_000), dtype=torch.uint8) for _ in paths]
        reads = start_reads(paths, [0] * 8, tensors)
        assert reads.wait() and reads.outcomes() == [None] * 8
        assert [int(tensor[-1]) for tensor in tensors] == list(range(8))

    def keep_reading() -> None:
        while not is_over.is_set():
            read()

    threads = [threading.Thread(target=keep_reading) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert [status_of_child(read) for _ in range(15)] == [0] * 15
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=LONG, check=False
    )


@pytest.mark.parametrize(
    "meanwhile",
    ["pass", "threading.Thread(target=reads.wait, daemon=True).start()", "del reads"],
    ids=["kept", "waited for", "dropped"],
)
def test_a_process_ends_while_a_read_is_stuck(tmp_path: Path, meanwhile: str) -> None:
    os.mkfifo(tmp_path / "stuck")
    code = (
        "import sys, threading, time, torch, hmi_kernels\n"
        "reads = hmi_kernels.start_reads([sys.argv[1]], [0], [torch.empty(4)])\n"
        "while not reads.outcomes()[0].has_begun: time.sleep(0.001)\n"
        f"{meanwhile}\n"
        "time.sleep(0.1)\n"
        "print('over')\n"
    )
    result = run(code, str(tmp_path / "stuck"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "over\n", "")


def test_there_are_at_most_256_threads(tmp_path: Path) -> None:
    code = (
        "import errno, os, sys, time, torch, hmi_kernels\n"
        "paths = [f'{sys.argv[1]}/{number}' for number in range(300)]\n"
        "for path in paths: os.mkfifo(path)\n"
        "num_threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = num_threads()\n"
        "tensors = [torch.empty(1) for _ in paths]\n"
        "reads = hmi_kernels.start_reads(paths, [0] * 300, tensors, num_threads=300)\n"
        "begun = lambda: sum(each.has_begun for each in reads.outcomes() if each)\n"
        "while begun() < 256: time.sleep(0.001)\n"
        "time.sleep(0.5)\n"
        "print(num_threads() - before, begun(), len(reads.pending))\n"
        "def release(path):\n"
        "    while True:\n"
        "        try: return os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))\n"
        "        except OSError as error: assert error.errno == errno.ENXIO\n"
        "for path in paths: release(path)\n"
        "print(reads.wait(), {each.errno for each in reads.outcomes()}, num_threads() - before)\n"
    )
    result = run(code, str(tmp_path))
    assert (result.stdout, result.stderr) == (f"256 256 300\nTrue {{{errno.ESPIPE}}} 256\n", "")
