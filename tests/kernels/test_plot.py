"""Look-up and merge against the formulas of the method, written token by token with dicts and lists."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import hmi_kernels
from hmi_kernels.native import native

NGram = tuple[int, ...]
VOCABULARY = 7
ABSENT = -1


@dataclass
class Case:
    """Some sequences over two tables of n-grams that overlap and that lack many."""

    sequences: list[list[int]]
    ngrams: list[list[NGram]]
    chains: list[list[int]]
    window: int

    def __post_init__(self) -> None:
        lengths = torch.tensor([0, *map(len, self.sequences)])
        ids = [token for sequence in self.sequences for token in sequence]
        self.input_ids = torch.tensor(ids, dtype=torch.int32)
        self.sequence_offsets = lengths.cumsum(0)
        self.indexes = [
            hmi_kernels.plot_index_build(hmi_kernels.ngram_keys(torch.tensor(table, dtype=torch.int32)))
            for table in self.ngrams
        ]
        self.chain_tensor = torch.tensor(self.chains, dtype=torch.int32)

    def lookup(self) -> Tensor:
        return hmi_kernels.plot_lookup(
            self.input_ids, self.sequence_offsets, self.indexes, self.chain_tensor, window=self.window
        )

    def find(self, sequence: int, ngram: NGram) -> int:
        for table in self.chains[sequence]:
            if table == ABSENT:
                break
            if ngram in self.ngrams[table]:
                return table << 40 | self.ngrams[table].index(ngram)
        return -1


def make_case(window: int, *, share: float = 0.5) -> Case:
    """Tables hold about that share of all windows there can be."""
    places = [torch.arange(VOCABULARY) for _ in range(window)]
    if window == 3:
        places = [torch.arange(-1, VOCABULARY) for _ in range(3)]
    every = [tuple(row) for row in torch.cartesian_prod(*places).tolist() if window == 2 or row[1] != ABSENT]
    ngrams = []
    for _ in range(2):
        order = torch.randperm(len(every))[: max(1, int(len(every) * share))]
        ngrams.append([every[i] for i in order.tolist()])
    lengths = [5, 1, 0, 2, 3, 90, 40]
    sequences = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    chains = [[0, 1], [1, 0], [0, -1], [1, -1], [-1, 0], [0, 1], [1, 0]]
    return Case(sequences, ngrams, chains, window)


def windows_of(sequence: list[int], t: int) -> tuple[int, int, int]:
    a = sequence[t - 1] if t > 0 else ABSENT
    c = sequence[t + 1] if t + 1 < len(sequence) else ABSENT
    return a, sequence[t], c


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lookup_of_bigrams(implementation: str, share: float) -> None:
    case = make_case(2, share=share)
    expected = [
        [case.find(s, (b, c)) if c != ABSENT else -1]
        for s, sequence in enumerate(case.sequences)
        for _, b, c in (windows_of(sequence, t) for t in range(len(sequence)))
    ]
    assert case.lookup().tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lookup_of_trigrams_falls_back_to_bigrams(implementation: str, share: float) -> None:
    case = make_case(3, share=share)
    expected = []
    for s, sequence in enumerate(case.sequences):
        for t in range(len(sequence)):
            a, b, c = windows_of(sequence, t)
            whole = case.find(s, (a, b, c))
            left = case.find(s, (a, b, ABSENT)) if whole < 0 and a != ABSENT else -1
            right = case.find(s, (ABSENT, b, c)) if whole < 0 and c != ABSENT else -1
            expected.append([whole, left, right])
    assert case.lookup().tolist() == expected


@dataclass
class Tables:
    rows: list[Tensor]
    unigrams: list[Tensor]
    unigram_table_of: list[int]
    positions: Tensor
    weight: Tensor
    bias: Tensor


def make_tables(case: Case, hidden_size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Tables:
    return Tables(
        rows=[
            torch.randn(len(ngrams), case.window, hidden_size).to(dtype)
            for ngrams, dtype in zip(case.ngrams, dtypes, strict=True)
        ],
        unigrams=[torch.randn(VOCABULARY, hidden_size).to(dtype) for dtype in dtypes],
        unigram_table_of=[s % 2 for s in range(len(case.sequences))],
        positions=torch.randn(90, hidden_size),
        weight=torch.randn(hidden_size),
        bias=torch.randn(hidden_size),
    )


def merge(case: Case, tables: Tables, references: Tensor) -> Tensor:
    return hmi_kernels.plot_merge(
        case.input_ids,
        case.sequence_offsets,
        references,
        tables.rows,
        tables.unigrams,
        torch.tensor(tables.unigram_table_of, dtype=torch.int32),
        tables.positions,
        tables.weight,
        tables.bias,
        layer_norm_eps=1e-5,
        window=case.window,
    )


def expected_bigram_state(case: Case, tables: Tables, s: int, t: int) -> Tensor:
    sequence = case.sequences[s]
    u = tables.unigrams[tables.unigram_table_of[s]][sequence[t]].double()
    state = u.clone()
    if t > 0 and (reference := case.find(s, (sequence[t - 1], sequence[t]))) >= 0:
        state += tables.rows[reference >> 40][reference & (2**40 - 1)][1].double() - u
    if t + 1 < len(sequence) and (reference := case.find(s, (sequence[t], sequence[t + 1]))) >= 0:
        state += tables.rows[reference >> 40][reference & (2**40 - 1)][0].double() - u
    return state


def expected_trigram_row(case: Case, tables: Tables, s: int, t: int) -> Tensor:
    """R of the window at t, [3, hidden]: its row or, if it is missing, composed of its bigrams."""
    a, b, c = windows_of(case.sequences[s], t)

    def row(ngram: NGram) -> Tensor | None:
        reference = case.find(s, ngram)
        return tables.rows[reference >> 40][reference & (2**40 - 1)].double() if reference >= 0 else None

    if (whole := row((a, b, c))) is not None:
        return whole
    u = tables.unigrams[tables.unigram_table_of[s]][b].double()
    left = row((a, b, ABSENT)) if a != ABSENT else None
    right = row((ABSENT, b, c)) if c != ABSENT else None
    nothing = torch.zeros_like(u)
    middle = (u if left is None else left[1]) + (u if right is None else right[1]) - u
    return torch.stack([nothing if left is None else left[0], middle, nothing if right is None else right[2]])


def expected_trigram_state(case: Case, tables: Tables, s: int, t: int) -> Tensor:
    state = expected_trigram_row(case, tables, s, t)[1]
    if t > 0:
        state = state + expected_trigram_row(case, tables, s, t - 1)[2]
    if t + 1 < len(case.sequences[s]):
        state = state + expected_trigram_row(case, tables, s, t + 1)[0]
    return state


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("hidden_size", "dtypes"),
    [
        (64, (torch.float16, torch.float16)),
        (37, (torch.float16, torch.float32)),
        (1, (torch.float32, torch.float32)),
        (150, (torch.float32, torch.float16)),
    ],
)
def test_merge_equals_the_formula(
    implementation: str, window: int, share: float, hidden_size: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case(window, share=share)
    tables = make_tables(case, hidden_size, dtypes)
    state = expected_bigram_state if window == 2 else expected_trigram_state
    sums = torch.stack(
        [
            state(case, tables, s, t) + tables.positions[t].double()
            for s, sequence in enumerate(case.sequences)
            for t in range(len(sequence))
        ]
    )
    expected = functional.layer_norm(sums, (hidden_size,), tables.weight.double(), tables.bias.double(), 1e-5)
    actual = merge(case, tables, case.lookup())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


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
        [finite],
        [0],
        torch.zeros(1, size),
        torch.full((size,), scale),
        torch.zeros(size),
    )
    torch.testing.assert_close(merge(case, tables, case.lookup()), finite.float(), rtol=1e-5, atol=0.0)
    for special in (float("inf"), float("nan")):
        tables.unigrams = [torch.full((1, size), special, dtype=torch.float16)]
        assert merge(case, tables, case.lookup()).isnan().all()


@pytest.mark.parametrize("window", [2, 3])
def test_neighbors_and_threads_change_no_bit(simd_level: str, threads_mode: str, window: int) -> None:
    case = make_case(window)
    case = Case(case.sequences * 9, case.ngrams, case.chains * 9, window)
    tables = make_tables(case, 50, (torch.float16, torch.float16))
    together = merge(case, tables, case.lookup())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(merge(case, tables, case.lookup()), together)
    torch.set_num_threads(before)
    for s, (begin, end) in enumerate(pairwise(case.sequence_offsets)):
        alone = Case([case.sequences[s]], case.ngrams, [case.chains[s]], window)
        own = Tables(**{**vars(tables), "unigram_table_of": [tables.unigram_table_of[s]]})
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
            merge(case, Tables(**{**vars(tables), "positions": tables.positions[:89]}), nothing)
        with pytest.raises(ValueError, match="sequence_unigram_tables"):
            merge(case, Tables(**{**vars(tables), "unigram_table_of": [2] * 7}), nothing)
        with pytest.raises(TypeError, match=r"row_tables\[1\]"):
            merge(
                case, Tables(**{**vars(tables), "rows": [tables.rows[0], tables.rows[1].double()]}), nothing
            )
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
