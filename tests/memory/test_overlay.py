"""The overlay: what was kept is found as it was, memory is bounded, what is used survives, threads agree."""

import gc
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_engine.memory.overlay import WindowOverlay

WINDOW, HIDDEN = 2, 2
ROW_BYTES = WINDOW * HIDDEN * 4 + 4 * 16 + 12
KEYS = st.lists(st.integers(1, 10**6), max_size=8, unique=True)


def make_overlay(rows_per_generation):
    overlay = WindowOverlay(2 * rows_per_generation * ROW_BYTES, WINDOW, HIDDEN, torch.float32)
    assert overlay.rows_per_generation == rows_per_generation
    return overlay


def rows_of(keys, layers="a"):
    """Rows that tell their key and the layers that computed them."""
    sign = 1.0 if layers == "a" else -1.0
    return torch.tensor([[[key % 97, key % 89], [key % 83, 1]] for key in keys]).float() * sign


def keep(overlay, keys, layers="a"):
    return overlay.keep(layers, torch.tensor(keys), rows_of(keys, layers)) if keys else 0


def found(overlay, keys, layers="a"):
    """{key: row} of those that the overlay has."""
    result = {}
    for table in overlay.hold(layers).tables:
        numbers = table.find(torch.tensor(keys, dtype=torch.int64)).tolist()
        result |= {key: table.rows[row] for key, row in zip(keys, numbers, strict=True) if row >= 0}
    return result


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("ab"), KEYS), max_size=30))
def test_what_was_kept_last_is_found_as_it_was(batches):
    overlay = make_overlay(16)
    for layers, keys in batches:
        keep(overlay, keys, layers)
        rows = found(overlay, keys, layers)
        assert rows.keys() == set(keys)
        for key, row in rows.items():
            torch.testing.assert_close(row, rows_of([key], layers)[0])
        assert overlay.num_rows <= 32


@settings(deadline=None, max_examples=50)
@given(st.lists(KEYS, min_size=2, max_size=30))
def test_rows_that_are_held_never_change(batches):
    """However often the overlay turns meanwhile."""
    overlay = make_overlay(8)
    keep(overlay, batches[0])
    hold = overlay.hold("a")
    tables = [
        (table, table.index, table.num_rows, table.rows[: table.num_rows].clone()) for table in hold.tables
    ]
    for keys in batches[1:]:
        keep(overlay, keys)
    for table, index, num_rows, rows in tables:
        assert torch.equal(table.rows[:num_rows], rows)
        numbers = index[index[:, 0] != 0][:, 1]
        assert len(numbers) == table.num_rows or index is not table.index


def test_a_key_is_kept_once():
    overlay = make_overlay(8)
    assert [keep(overlay, [1, 2]), keep(overlay, [2, 3]), keep(overlay, [1, 2, 3])] == [2, 1, 0]
    assert overlay.num_rows == 3


def test_layers_of_another_identity_never_answer():
    overlay = make_overlay(8)
    keep(overlay, [1, 2])
    assert found(overlay, [1, 2], "b") == {}
    keep(overlay, [2], "b")
    torch.testing.assert_close(found(overlay, [2], "b")[2], rows_of([2], "b")[0])


def test_what_is_used_survives():
    overlay = make_overlay(8)
    keep(overlay, list(range(1, 9)))
    (table,) = overlay.hold("a").tables
    table.count_hits(table.find(torch.tensor([3, 5, 5, 3, 7])))
    del table
    for first in range(100, 130, 5):
        keep(overlay, list(range(first, first + 5)))
        for used in overlay.hold("a").tables:
            rows = used.find(torch.tensor([3, 5]))
            used.count_hits(rows[rows >= 0])
    assert found(overlay, list(range(1, 9))).keys() == {3, 5}, "7 was used long ago, the others never"


def test_most_of_a_generation_stays_for_what_is_new():
    overlay = make_overlay(8)
    for first in (0, 8, 16):
        keep(overlay, list(range(first + 1, first + 9)))
        for table in overlay.hold("a").tables:
            table.count_hits(torch.arange(table.num_rows).repeat(3))
    young, old = overlay.hold("a").tables
    assert young.num_rows == 4 + 4, "half of it survivors, and as much of the new as there is room for"
    assert old.num_rows == 8


def test_turning_waits_while_the_generation_given_up_is_held():
    overlay = make_overlay(4)
    keep(overlay, [1, 2, 3, 4])
    keep(overlay, [5, 6, 7, 8])
    hold = overlay.hold("a")
    assert keep(overlay, [9, 10, 11, 12]) == 4, "the generation of 1 to 4 is given up, but its memory stays"
    assert keep(overlay, [13]) == 0, "nothing else may be given up now"
    assert hold.tables[1].find(torch.tensor([1])).tolist() == [0]
    del hold
    gc.collect()
    assert keep(overlay, [13]) == 1
    assert overlay.num_rows == 5


def test_an_overlay_without_room_keeps_nothing():
    overlay = WindowOverlay(10, WINDOW, HIDDEN, torch.float32)
    assert keep(overlay, [1, 2]) == 0 and overlay.num_rows == 0
    assert keep(make_overlay(2), [1, 2, 3]) == 2


def test_cleared():
    overlay = make_overlay(4)
    keep(overlay, [1, 2])
    overlay.clear()
    assert overlay.num_rows == 0 and found(overlay, [1, 2]) == {}


def test_many_threads_keep_and_find():
    """Everything that is found is right, at any moment."""
    overlay = make_overlay(256)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            keys = torch.randint(1, 2000, (40,), generator=generator).unique().tolist()
            for key, row in found(overlay, keys).items():
                if not torch.equal(row, rows_of([key])[0]):
                    wrong.append(key)
            keep(overlay, keys)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 256 < overlay.num_rows <= 512
