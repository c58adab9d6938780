"""An exception at any line, such as Ctrl-C's: afterwards memory is whole, and who is there is who it says."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from arena_accounts import GRANULE, assert_nothing_is_lost

import hmi_engine.memory

FOLDER = Path(hmi_engine.memory.__file__).parent
FILES = {
    str(FOLDER / name)
    for name in (
        "residency.py",
        "arena_loading.py",
        "host_tier.py",
        "held_tenants.py",
        "departures.py",
        "placement.py",
        "slot_tables.py",
        "arena.py",
        "ranges.py",
    )
}


# Lines at which the interpreter does nothing that can be interrupted: the beginning of a block, and a with
# statement's a second time, when its block is left.
PASSED = {
    (name, node.lineno)
    for name in FILES
    for node in ast.walk(ast.parse(Path(name).read_text()))
    if isinstance(node, ast.With | ast.Try)
}


class Interrupted(BaseException):
    """In the place of KeyboardInterrupt, which pytest minds."""


def lines_of(action, stop_before=None):
    """Runs it until it comes to a line of the files by its number; returns the lines it came to before."""
    lines = []

    def trace(frame, event, _):
        line = frame.f_code.co_filename, frame.f_lineno
        if line[0] not in FILES:
            return None
        if event == "line" and line not in PASSED:
            if len(lines) == stop_before:
                raise Interrupted
            lines.append(line)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupted:
        assert len(lines) == stop_before
    else:
        assert stop_before is None
    finally:
        sys.settrace(before)
    return lines


@pytest.fixture
def infos(add_tenant):
    """Small ones and large ones, of a size each."""
    small = [add_tenant(f"s{number}", 0, number) for number in range(6)]
    return small, [add_tenant(f"g{number}", 64, 4 * number) for number in range(5)]


@pytest.fixture
def large(add_tenant):
    return add_tenant("large", 128, 0)


@pytest.mark.parametrize("host", [None, 60])
def test_memory_is_whole(open_residency, infos, large, contents, host):
    """Where a large tenant makes others leave, and small ones move that are in its way."""
    small, others = infos
    expected = {info.name: contents(info) for info in [*small, *others, large]}
    size = -(-others[0].bytes // GRANULE)

    def work(residency):
        tickets = residency.expect([small, [large]])
        try:
            for batch in (small[1:], [large]):
                held = residency.holding(batch)
                try:
                    held.release()
                finally:
                    held.release()
            residency.prefetch(others[:1])
        finally:
            residency.release(*tickets)

    def run(stop_before=None):
        residency = open_residency(6 + 5 * size, host=host)
        for pair in zip(small, others, strict=False):
            residency.holding(pair).release()
        residency.prefetch(small)
        in_use = residency.holding(small[:1])
        lines = lines_of(lambda: work(residency), stop_before)
        check_who_is_there(residency, expected, in_use)
        moves = residency.statistics.moves
        residency.close()
        return lines, moves

    lines, moves = run()
    assert moves and len(set(lines)) > 200
    for number in {line: number for number, line in enumerate(lines)}.values():  # of each its last time
        run(number)


def check_who_is_there(residency, expected, in_use):
    assert residency._users == {each for placed in residency._placement.all() for each in placed.used_by}
    for placed in residency._placement.all():
        assert placed.claims == placed.users == (placed.info.name == "s0")
        lies = residency._placement.parameters(placed)
        assert torch.equal(lies, expected[placed.info.name])
        assert int((residency.slots._tables[0][:, placed.slot] >= 0).sum()) == len(placed.layout.blocks)
    in_use.release()
    assert_nothing_is_lost(residency)
    assert not residency._loading.locked()
    assert len(residency.slots._free) == residency.slots.num_slots - residency.num_resident


def test_nobody_waits_for_ever(open_residency, infos):
    """Where noting a queue is interrupted, nobody has the tickets to give back."""
    residency = open_residency(100, host=60)
    small, others = infos
    tickets = residency.expect([others])
    queues = residency._queue, residency._host._queue
    for number in range(len(lines_of(lambda: residency.release(*residency.expect([small, others]))))):
        noted = []
        try:
            lines_of(lambda noted=noted: noted.extend(residency.expect([small, others])), number)
        except AssertionError:
            break  # it had no more lines
        assert not noted
    assert number > 10
    residency.release(*noted, *tickets)
    assert not any(queue._waiting for queue in queues)
