"""The PLOT baseline computes the reference merge, and the hit curves count what Counter counts."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import hmi_kernels
from hmi_engine.knowledge.plot_table import PlotMetadata, open_plot
from hmi_engine.models.packing import PackedSequences

REASON = "the PLOT baseline needs numba (extra: bench)"
NumbaPlot = pytest.importorskip("benchmarks.peers.numba_plot", reason=REASON).NumbaPlot
GatheredPlot = pytest.importorskip("benchmarks.peers.gathered_plot", reason=REASON).GatheredPlot
lookup = pytest.importorskip("benchmarks.plot_lookup", reason=REASON)
opening = pytest.importorskip("benchmarks.plot_opening", reason=REASON)
hit_curves = pytest.importorskip("benchmarks.plot", reason=REASON).hit_curves

VOCABULARY, HIDDEN = 12, 16


def random_sequences(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (20,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def windows(sequences: list[list[int]], window: int) -> set[tuple[int, ...]]:
    """Half of all windows that occur, by slot, -1 where absent; with width 3, bigrams of both sides too."""
    found = set()
    for ids in sequences:
        padded = [-1, *ids, -1]
        for a, b, c in zip(padded[:-2], padded[1:-1], padded[2:], strict=True):
            found |= {(b, c)} if window == 2 else {(a, b, c), (a, b, -1), (-1, b, c)}
    return {slots for slots in sorted(found) if hash(slots) % 2 and sum(slot >= 0 for slot in slots) > 1}


@pytest.mark.parametrize("window", [2, 3])
def test_baselines_are_the_reference_merge_before_its_layer_norm(window: int) -> None:
    sequences = random_sequences(0)
    packed = PackedSequences.pack(sequences)
    slots = torch.tensor(sorted(windows(sequences, window)), dtype=torch.int32)
    keys = hmi_kernels.ngram_keys(slots)
    torch.manual_seed(1)
    rows = torch.randn(len(keys), window, HIDDEN).half()
    rows[(slots < 0)] = 0
    unigrams = torch.randn(VOCABULARY, 3, HIDDEN).half()
    chains = torch.zeros(packed.num_sequences, 1, dtype=torch.int32)
    with hmi_kernels.use_backend("reference"):
        references = hmi_kernels.plot_lookup(
            packed.input_ids, packed.offsets, [hmi_kernels.plot_index_build(keys)], chains, window=window
        )
        expected = hmi_kernels.plot_merge(
            packed.input_ids,
            packed.offsets,
            references,
            [rows],
            [unigrams],
            chains[:, 0].contiguous(),
            torch.zeros(32, HIDDEN),
            torch.ones(HIDDEN),
            torch.zeros(HIDDEN),
            layer_norm_eps=1e-5,
            window=window,
        )
    arrays = (keys.numpy(), rows.numpy(), unigrams.numpy())
    for peer in (
        GatheredPlot(*arrays, window=window),
        NumbaPlot(*arrays, window=window, parallel=False),
        NumbaPlot(*arrays, window=window, parallel=True),
    ):
        merged = torch.from_numpy(peer.run(packed.input_ids.numpy(), packed.offsets.numpy()))
        found = torch.nn.functional.layer_norm(merged, (HIDDEN,), eps=1e-5)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [2, 3])
def test_every_system_finds_what_a_dictionary_of_windows_holds(window: int) -> None:
    sequences = random_sequences(4)
    held = windows(sequences, window)
    slots = sorted(held)
    rows = {slot: row for row, slot in enumerate(slots)}
    keys = hmi_kernels.ngram_keys(torch.tensor(slots, dtype=torch.int32))
    packed = PackedSequences.pack(sequences)
    expected = []
    for ids in sequences:
        for a, b, c in zip([-1, *ids[:-1]], ids, [*ids[1:], -1], strict=True):
            if window == 2:
                expected.append([rows.get((b, c), -1)])
                continue
            whole = rows.get((a, b, c), -1)
            sides = [rows.get((a, b, -1), -1) if a >= 0 else -1, rows.get((-1, b, c), -1) if c >= 0 else -1]
            expected.append([whole, *(sides if whole < 0 else [-1, -1])])
    index = hmi_kernels.plot_index_build(keys)
    for name, search in lookup.lookup_systems(index, keys, window=window).items():
        assert search(packed).tolist() == expected, name
    case = lookup.lookup_case("search", index, keys, [packed], window=window, repetitions=2)
    found = sum(max(references) >= 0 for references in expected)
    assert case.settings["share_of_tokens_found"] == round(found / len(expected), 3)
    assert {ratio.faster for ratio in case.ratios} == {lookup.OURS}


SPARSE_METADATA = PlotMetadata(
    family="bert",
    window=2,
    plot_layers=1,
    hidden_size=32,
    placeholder_token_id=103,
    vocab_size=30522,
    row_dtype="float16",
    row_format="float16",
    layer_identity="made up",
    corpus_tokens=1,
    min_count=1,
    admission_count=1,
)


@pytest.fixture(scope="module")
def sparse_keys() -> torch.Tensor:
    real_keys = hmi_kernels.ngram_keys(torch.tensor([[1, 2]], dtype=torch.int32))
    return opening.made_up_keys(4096, 30522, real_keys)


@pytest.fixture(scope="module")
def sparse_table(sparse_keys: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "sparse.plot"
    opening.write_sparse_table(path, sparse_keys, SPARSE_METADATA)
    return path


def test_a_sparse_table_is_a_plot_file(sparse_keys: torch.Tensor, sparse_table: Path) -> None:
    table = open_plot(sparse_table)
    assert table.metadata == SPARSE_METADATA
    assert torch.equal(table.row_keys, sparse_keys)
    assert torch.equal(table.index, hmi_kernels.plot_index_build(sparse_keys))
    assert not table.rows.any()
    with safe_open(sparse_table, "pt") as file:
        assert file.get_slice("rows").get_shape() == [len(sparse_keys), 2, 32]
    case = opening.opening_case(sparse_table, sparse_keys, 2)
    assert case.settings == {"rows": len(sparse_keys), "file_bytes": sparse_table.stat().st_size}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_processes_share_a_table(sparse_table: Path) -> None:
    """Each of them imports torch, which takes most of the time."""
    table = open_plot(sparse_table)
    figures = [quantity.value for quantity in opening.sharing_quantities(sparse_table)]
    first, untouched, resident, proportional, private = figures
    assert first > 0
    # KiB: the index has been looked through, and the rows have not.
    assert table.index.nbytes / 1024 <= untouched < (table.index.nbytes + table.rows.nbytes) / 1024
    assert resident >= table.index.nbytes / 2**20
    assert proportional <= resident
    assert private == 0


def test_hit_curves_count_like_counter() -> None:
    corpus, held_out = random_sequences(2), random_sequences(3)
    curves = hit_curves(corpus, PackedSequences.pack(held_out), num_points=3)
    for order, curve in enumerate(curves, start=1):

        def grams(texts: list[list[int]], order: int = order) -> Counter[tuple[int, ...]]:
            return Counter(tuple(ids[i : i + order]) for ids in texts for i in range(len(ids) - order + 1))

        wanted = grams(held_out)
        for size, tokens, share in zip((5, 10, 20), curve.x, curve.y, strict=True):
            held = {gram for gram, count in grams(corpus[:size]).items() if count >= 2}
            hits = sum(count for gram, count in wanted.items() if gram in held)
            assert share == pytest.approx(hits / wanted.total())
            assert tokens == sum(map(len, corpus[:size]))
