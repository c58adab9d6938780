"""Look-up and merge against the formulas of the method."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from kernels.plot_cases import (
    VOCABULARY,
    Case,
    Tables,
    assert_merged,
    expected_references,
    make_case,
    make_tables,
    merge,
)

import hmi_kernels
from hmi_kernels.native import native


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lookup_finds_windows_and_what_they_fall_back_to(
    implementation: str, window: int, share: float
) -> None:
    case = make_case(window, share=share)
    assert case.lookup().tolist() == expected_references(case)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("hidden_size", "dtypes"),
    [
        (64, (torch.float16, torch.float16)),
        (37, (torch.float16, torch.float32)),
        (1, (torch.float32, torch.float32)),
        (150, (torch.float32, torch.float16)),
        (64, (torch.int8, torch.int8)),
        (37, (torch.float16, torch.int8)),
        (150, (torch.int8, torch.float32)),
    ],
)
def test_merge_equals_the_formula(
    implementation: str, window: int, share: float, hidden_size: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case(window, share=share)
    tables = make_tables(case, hidden_size, dtypes)
    assert_merged(case, tables, merge(case, tables, case.lookup()))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("hidden_size", "piece_size", "dtypes"),
    [
        (64, 4, (torch.uint8, torch.uint8)),
        (64, 8, (torch.uint8, torch.uint8)),
        (4, 4, (torch.uint8, torch.float32)),
        (8, 8, (torch.float16, torch.uint8)),
        # Ends within a vector, of every SIMD level, after one, two and three pieces.
        (84, 4, (torch.float16, torch.uint8)),
        (88, 4, (torch.int8, torch.uint8)),
        (92, 4, (torch.uint8, torch.float16)),
        (152, 8, (torch.uint8, torch.int8)),
    ],
)
def test_merge_of_codes_equals_the_formula(
    implementation: str,
    window: int,
    hidden_size: int,
    piece_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    case = make_case(window)
    tables = make_tables(case, hidden_size, dtypes, piece_size=piece_size)
    assert_merged(case, tables, merge(case, tables, case.lookup()))


def test_every_code_is_read_exactly(simd_level: str) -> None:
    """A bigram whose slots hold all codes, up and down."""
    codes = torch.stack([torch.arange(256), torch.arange(255, -1, -1)]).to(torch.uint8).unsqueeze(0)
    for piece_size in (4, 8):
        size = 256 * piece_size
        books = torch.randn(2, 256, 256, piece_size).half()
        tables = Tables(
            rows=[codes],
            unigrams=[torch.zeros(1, 3, size)],
            unigram_table_of=[0],
            positions=torch.zeros(2, size),
            weight=torch.ones(size),
            bias=torch.zeros(size),
            codebooks=[books],
        )
        case = Case([[0, 0]], [[(0, 0)]], [[0]], 2)
        of_slot = [books[w, torch.arange(256), codes[0, w].long()].flatten().float() for w in (0, 1)]
        expected = torch.nn.functional.layer_norm(torch.stack(of_slot), (size,))
        torch.testing.assert_close(merge(case, tables, case.lookup()), expected, rtol=1e-5, atol=1e-5)


def test_other_pieces_are_left_to_the_reference() -> None:
    case = make_case(2)
    tables = make_tables(case, 24, (torch.uint8, torch.float16), piece_size=6)
    assert_merged(case, tables, merge(case, tables, case.lookup()))
    with hmi_kernels.use_backend("cpu"), pytest.raises(ValueError, match=r"4 or 8 elements, not \[6\]"):
        merge(case, tables, case.lookup())


def test_codebooks_belong_to_tables_of_codes() -> None:
    case = make_case(2)
    tables = make_tables(case, 8, (torch.uint8, torch.float16))
    book, nothing = tables.codebooks
    for message, changes in (
        (r"row_tables\[0\] is torch.uint8: codebooks", {"codebooks": []}),
        ("codebooks must be 2, one for each", {"codebooks": [book]}),
        (r"codebooks\[0\] must have the shape \[2, 2, 256, 4\]", {"codebooks": [book[:, :, :255], nothing]}),
        (r"codebooks\[0\] must have the shape", {"codebooks": [book[:1], nothing]}),
        (r"codebooks\[0\] must have the shape", {"codebooks": [book[..., :3].contiguous(), nothing]}),
        (r"codebooks\[1\] must be empty", {"codebooks": [book, book]}),
        (r"divides 8, not 3", {"rows": [torch.zeros(5, 2, 3, dtype=torch.uint8), tables.rows[1]]}),
        (r"divides 8, not 0", {"rows": [torch.zeros(5, 2, 0, dtype=torch.uint8), tables.rows[1]]}),
    ):
        with pytest.raises(ValueError, match=message):
            merge(case, replace(tables, **changes), case.lookup())
    with pytest.raises(TypeError, match=r"codebooks\[0\] must be torch.float16"):
        merge(case, replace(tables, codebooks=[book.float(), nothing]), case.lookup())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tables_of_codes_end_where_they_say(backend: str) -> None:
    case = make_case(2)
    tables = make_tables(case, 8, (torch.uint8, torch.uint8))
    references = case.lookup()
    references[0, 0] = tables.rows[0].shape[0]
    with hmi_kernels.use_backend(backend), pytest.raises(ValueError, match="references"):
        merge(case, tables, references)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("compute_type", [torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_positions(window: int, compute_type: torch.dtype) -> None:
    """On the CPU by the reference, which sums in float32 and rounds once."""
    case = make_case(window)
    tables = make_tables(case, 24, (torch.bfloat16, torch.int8), compute_type)
    assert_merged(case, tables, merge(case, tables, case.lookup()))
    with (
        hmi_kernels.use_backend("cpu"),
        pytest.raises(ValueError, match=r"position_embeddings must be torch\.float32"),
    ):
        merge(case, tables, case.lookup())


def test_bfloat16_rows_are_left_to_the_reference() -> None:
    case = make_case(2)
    tables = make_tables(case, 24, (torch.bfloat16, torch.float16))
    assert_merged(case, tables, merge(case, tables, case.lookup()))
    with hmi_kernels.use_backend("cpu"), pytest.raises(ValueError, match=r"must not be torch\.bfloat16"):
        merge(case, tables, case.lookup())


def test_every_int8_is_read_exactly(simd_level: str) -> None:
    """The mean of all of them is zero, so that LayerNorm only scales."""
    values = torch.arange(-127, 128, dtype=torch.int8)
    size = values.shape[0]
    spread = float(values.double().pow(2).mean().sqrt())
    tables = Tables(
        rows=[values.expand(1, 2, size).contiguous()],
        unigrams=[torch.zeros(1, 3, size)],
        unigram_table_of=[0],
        positions=torch.zeros(2, size),
        weight=torch.full((size,), spread),
        bias=torch.zeros(size),
        scales=[torch.tensor([[0.5, 4.0]])],
    )
    case = Case([[0, 0]], [[(0, 0)]], [[0]], 2)
    expected = values.float().expand(2, size)
    torch.testing.assert_close(merge(case, tables, case.lookup()), expected, rtol=1e-5, atol=1e-5)


def test_quantized_rows_lose_at_most_half_of_their_scale() -> None:
    wide = torch.randn(64, 3, 40) * torch.logspace(-44, 30, 64).view(-1, 1, 1)
    wide[5, 1] = 0.0
    for dtype in (torch.float32, torch.float16, torch.float64):
        rows = wide.clamp(-60000, 60000).to(dtype)
        quantized, scales = hmi_kernels.quantize_rows(rows)
        assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float32)
        assert quantized.abs().max() == 127 and scales[5, 1] == 0 and not quantized[5, 1].any()
        largest = rows.double().abs().amax(dim=2)
        expected = torch.where(largest > 0, (largest / 127).clamp(min=2.0**-126), 0.0)
        torch.testing.assert_close(scales.double(), expected, rtol=2.0**-24, atol=0.0)
        exact_scales = scales.double().unsqueeze(2)
        lost = (rows.double() - quantized.double() * exact_scales).abs()
        assert bool((lost <= exact_scales * (0.5 + 1e-6)).all())
    assert [part.shape for part in hmi_kernels.quantize_rows(torch.empty(0, 2, 8))] == [
        (0, 2, 8),
        (0, 2),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_int8_cannot_hold_are_refused(bad: float) -> None:
    rows = torch.zeros(3, 2, 8)
    rows[1, 1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        hmi_kernels.quantize_rows(rows)
    with pytest.raises(TypeError, match="rows must be"):
        hmi_kernels.quantize_rows(rows.int())


def test_row_scales_belong_to_int8_tables() -> None:
    case = make_case(2)
    tables = make_tables(case, 8, (torch.int8, torch.float16))
    for message, scales in (
        (r"row_tables\[0\] is torch.int8: row_scales", []),
        ("row_scales must be 2, one for each", tables.scales[:1]),
        (r"row_scales\[0\] must have the shape", [tables.scales[0][:, :1], tables.scales[1]]),
        (r"row_scales\[1\] must be empty", [tables.scales[0]] * 2),
    ):
        with pytest.raises(ValueError, match=message):
            merge(case, replace(tables, scales=scales), case.lookup())
    with pytest.raises(TypeError, match=r"row_scales\[0\] must be torch.float32"):
        merge(case, replace(tables, scales=[tables.scales[0].double(), tables.scales[1]]), case.lookup())


def test_every_half_is_read_exactly(simd_level: str) -> None:
    """Subnormals, infinities and NaN too; position and normalization change nothing here."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = halves[halves.isfinite()].view(1, -1)
    finite = torch.cat([finite, -finite], dim=1)  # the mean is zero, so that LayerNorm only scales
    scale = float(finite.double().pow(2).mean().sqrt())
    case = Case([[0]], [[(0, 0)]], [[-1]], 2)
    size = finite.shape[1]
    tables = Tables(
        [torch.zeros(1, 2, size)],
        [finite.expand(3, -1).unsqueeze(0).contiguous()],
        [0],
        torch.zeros(1, size),
        torch.full((size,), scale),
        torch.zeros(size),
    )
    torch.testing.assert_close(merge(case, tables, case.lookup()), finite.float(), rtol=1e-5, atol=0.0)
    for special in (float("inf"), float("nan")):
        tables.unigrams = [torch.full((1, 3, size), special, dtype=torch.float16)]
        assert merge(case, tables, case.lookup()).isnan().all()


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("hidden_size", "dtypes"),
    [(50, (torch.float16, torch.float16)), (52, (torch.uint8, torch.int8))],
    ids=["floats", "codes"],
)
def test_neighbors_and_threads_change_no_bit(
    simd_level: str, threads_mode: str, window: int, hidden_size: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case(window)
    case = Case(case.sequences * 9, case.ngrams, case.chains * 9, window)
    tables = make_tables(case, hidden_size, dtypes)
    together = merge(case, tables, case.lookup())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(merge(case, tables, case.lookup()), together)
    torch.set_num_threads(before)
    for s, (begin, end) in enumerate(pairwise(case.sequence_offsets)):
        alone = Case([case.sequences[s]], case.ngrams, [case.chains[s]], window)
        own = replace(tables, unigram_table_of=[tables.unigram_table_of[s]])
        assert torch.equal(merge(alone, own, alone.lookup()), together[begin:end])


def test_reference_merge_can_be_differentiated() -> None:
    case = make_case(2)
    tables = make_tables(case, 4, (torch.float32, torch.float32))
    rows = tables.rows[0].requires_grad_()
    references = case.lookup()
    arguments = (case.input_ids, case.sequence_offsets, references, tables.rows, tables.unigrams)
    of_table = torch.tensor(tables.unigram_table_of, dtype=torch.int32)
    hmi_kernels.reference.plot_merge(
        *arguments, of_table, tables.positions, tables.weight, tables.bias, layer_norm_eps=1e-5, window=2
    ).pow(2).sum().backward()
    assert rows.grad is not None
    used = {reference for reference in references.flatten().tolist() if 0 <= reference < len(rows)}
    assert {i for i, gradient in enumerate(rows.grad) if gradient.any()} == used


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "reference",
    [-2, 5 << 40, (1 << 40) - 1, -(2**63), 2**62],
    ids=["below", "table", "row", "least", "great"],
)
def test_merge_refuses_references_to_nowhere(backend: str, reference: int) -> None:
    case = make_case(2)
    tables = make_tables(case, 8, (torch.float16, torch.float16))
    references = case.lookup()
    references[0, 0] = reference
    with hmi_kernels.use_backend(backend), pytest.raises(ValueError, match="references"):
        merge(case, tables, references)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_merge_refuses_what_lies_outside(backend: str) -> None:
    case = make_case(2, share=0.0)
    tables = make_tables(case, 8, (torch.float16, torch.float16))
    nothing = torch.full_like(case.lookup(), -1)
    with hmi_kernels.use_backend(backend):
        case.input_ids[3] = VOCABULARY
        with pytest.raises(ValueError, match="id"):
            merge(case, tables, nothing)
        case.input_ids[3] = 0
        with pytest.raises(ValueError, match="90 tokens, but position_embeddings has 89"):
            merge(case, replace(tables, positions=tables.positions[:89]), nothing)
        with pytest.raises(ValueError, match="sequence_unigram_tables"):
            merge(case, replace(tables, unigram_table_of=[2] * 7), nothing)
        with pytest.raises(TypeError, match=r"row_tables\[1\]"):
            merge(case, replace(tables, rows=[tables.rows[0], tables.rows[1].double()]), nothing)
        with pytest.raises(ValueError, match=r"references must have the shape \[141, 1\]"):
            merge(case, tables, torch.full((141, 3), -1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [2, 3])
def test_lookup_refuses(backend: str, window: int) -> None:
    case = make_case(window)
    with hmi_kernels.use_backend(backend):
        case.chain_tensor[1, 1] = 2
        with pytest.raises(ValueError, match="chains"):
            case.lookup()
        case.chain_tensor[1, 1] = 0
        for bad in (-1, 2**21 - 1):
            case.input_ids[4] = bad
            with pytest.raises(ValueError, match="input_ids"):
                case.lookup()
        case.input_ids[4] = 0
        case.window = 4
        with pytest.raises(ValueError, match="window must be 2 or 3, not 4"):
            case.lookup()


def test_a_batch_without_tokens(implementation: str) -> None:
    case = Case([[], []], [[(0, 1)]], [[0], [0]], 2)
    case.input_ids = torch.empty(0, dtype=torch.int32)
    tables = make_tables(Case([], [[(0, 1)], [(0, 1)]], [], 2), 8, (torch.float16, torch.float16))
    tables.unigram_table_of = [0, 1]
    assert case.lookup().shape == (0, 1)
    assert merge(case, tables, case.lookup()).shape == (0, 8)


def test_a_bad_token_is_named_whatever_the_timing() -> None:
    ids = torch.zeros(50_000, dtype=torch.int32)
    ids[[20_001, 44_000]] = -9
    index = hmi_kernels.plot_index_build(torch.tensor([1]))
    for mode in ("pool", "openmp"):
        native.set_threads_mode(mode)
        with pytest.raises(ValueError, match=r"input_ids\[20001\] is -9"):
            hmi_kernels.plot_lookup(
                ids, torch.tensor([0, 50_000]), [index], torch.zeros(1, 1, dtype=torch.int32), window=2
            )
    native.set_threads_mode("auto")
