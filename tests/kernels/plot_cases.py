"""Batches over two tables of n-grams, and what look-up and merge make of them by the formulas of the method.

Written token by token with dicts and lists, in float64: the oracle of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

import hmi_kernels

NGram = tuple[int, ...]
VOCABULARY = 7
ABSENT = -1
FLOAT32_UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""


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


def expected_references(case: Case) -> list[list[int]]:
    places = [
        (s, *windows_of(sequence, t))
        for s, sequence in enumerate(case.sequences)
        for t in range(len(sequence))
    ]
    if case.window == 2:
        return [[case.find(s, (b, c)) if c != ABSENT else -1] for s, _, b, c in places]
    expected = []
    for s, a, b, c in places:
        whole = case.find(s, (a, b, c))
        left = case.find(s, (a, b, ABSENT)) if whole < 0 and a != ABSENT else -1
        right = case.find(s, (ABSENT, b, c)) if whole < 0 and c != ABSENT else -1
        expected.append([whole, left, right])
    return expected


@dataclass
class Tables:
    rows: list[Tensor]
    unigrams: list[Tensor]
    unigram_table_of: list[int]
    positions: Tensor
    weight: Tensor
    bias: Tensor
    scales: list[Tensor] = field(default_factory=list)
    codebooks: list[Tensor] = field(default_factory=list)

    def row(self, reference: int) -> Tensor:
        """float64 [window, hidden]."""
        table, row = reference >> 40, reference & (2**40 - 1)
        content = self.rows[table][row]
        if content.dtype is torch.uint8:
            books = self.codebooks[table].double()
            pieces = [
                [books[w, m, code] for m, code in enumerate(codes)]
                for w, codes in enumerate(content.tolist())
            ]
            return torch.stack([torch.cat(slot) for slot in pieces])
        if content.dtype is torch.int8:
            return content.double() * self.scales[table][row].double().unsqueeze(1)
        return content.double()


def make_tables(
    case: Case,
    hidden_size: int,
    dtypes: tuple[torch.dtype, ...],
    compute_type: torch.dtype = torch.float32,
    *,
    piece_size: int = 4,
) -> Tables:
    """A table of each dtype, uint8 being codes of pieces of ``piece_size``; unigrams are of floats."""
    rows, scales, codebooks = [], [], []
    for ngrams, dtype in zip(case.ngrams, dtypes, strict=True):
        table, scale, codebook = (
            torch.randn(len(ngrams), case.window, hidden_size),
            torch.empty(0),
            torch.empty(0),
        )
        if dtype is torch.uint8:
            num_codes = hidden_size // piece_size
            table = torch.randint(0, 256, (len(ngrams), case.window, num_codes), dtype=torch.uint8)
            codebook = torch.randn(case.window, num_codes, 256, piece_size).half()
        elif dtype is torch.int8:
            table, scale = hmi_kernels.quantize_rows(table)
        else:
            table = table.to(dtype)
        rows.append(table)
        scales.append(scale)
        codebooks.append(codebook)
    float_types = [dtype if dtype.is_floating_point else torch.float16 for dtype in dtypes]
    return Tables(
        rows=rows,
        unigrams=[torch.randn(VOCABULARY, 3, hidden_size).to(dtype) for dtype in float_types],
        unigram_table_of=[s % len(dtypes) for s in range(len(case.sequences))],
        positions=torch.randn(90, hidden_size).to(compute_type),
        weight=torch.randn(hidden_size).to(compute_type),
        bias=torch.randn(hidden_size).to(compute_type),
        scales=scales if torch.int8 in dtypes else [],
        codebooks=codebooks if torch.uint8 in dtypes else [],
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
        row_scales=tables.scales,
        codebooks=tables.codebooks,
    )


def unigram(tables: Tables, s: int, token: int) -> Tensor:
    """float64 [3, hidden]."""
    return tables.unigrams[tables.unigram_table_of[s]][token].double()


def expected_bigram_state(case: Case, tables: Tables, s: int, t: int) -> Tensor:
    sequence = case.sequences[s]
    alone, after_mask, before_mask = unigram(tables, s, sequence[t])
    state = alone.clone()
    if t > 0:
        reference = case.find(s, (sequence[t - 1], sequence[t]))
        state += (tables.row(reference)[1] if reference >= 0 else after_mask) - alone
    if t + 1 < len(sequence):
        reference = case.find(s, (sequence[t], sequence[t + 1]))
        state += (tables.row(reference)[0] if reference >= 0 else before_mask) - alone
    return state


def expected_trigram_row(case: Case, tables: Tables, s: int, t: int) -> list[Tensor | None]:
    """R of the window at t, a row [hidden] for each of its tokens: its own, or composed."""
    a, b, c = windows_of(case.sequences[s], t)

    def row(ngram: NGram) -> Tensor | None:
        reference = case.find(s, ngram)
        return tables.row(reference) if reference >= 0 else None

    if (whole := row((a, b, c))) is not None:
        return [*whole]
    u = unigram(tables, s, b)[1]
    left = row((a, b, ABSENT)) if a != ABSENT else None
    right = row((ABSENT, b, c)) if c != ABSENT else None
    middle = (u if left is None else left[1]) + (u if right is None else right[1]) - u
    first = None if a == ABSENT else unigram(tables, s, a)[0] if left is None else left[0]
    last = None if c == ABSENT else unigram(tables, s, c)[2] if right is None else right[2]
    return [first, middle, last]


def expected_trigram_state(case: Case, tables: Tables, s: int, t: int) -> Tensor:
    state = expected_trigram_row(case, tables, s, t)[1]
    if t > 0:
        state = state + expected_trigram_row(case, tables, s, t - 1)[2]
    if t + 1 < len(case.sequences[s]):
        state = state + expected_trigram_row(case, tables, s, t + 1)[0]
    return state


def expected_sums(case: Case, tables: Tables) -> Tensor:
    """float64 [tokens, hidden]: what LayerNorm is given."""
    state = expected_bigram_state if case.window == 2 else expected_trigram_state
    sums = [
        state(case, tables, s, t) + tables.positions[t].double()
        for s, sequence in enumerate(case.sequences)
        for t in range(len(sequence))
    ]
    return torch.stack(sums) if sums else torch.empty(0, tables.positions.shape[1], dtype=torch.float64)


def expected_merge(case: Case, tables: Tables) -> Tensor:
    """float64 [tokens, hidden]."""
    sums = expected_sums(case, tables)
    return functional.layer_norm(sums, sums.shape[1:], tables.weight.double(), tables.bias.double(), 1e-5)


def assert_merged(case: Case, tables: Tables, actual: Tensor) -> None:
    """Asserts that the output is as near to the formula in float64 as its dtype and float32 sums allow.

    At most six rows are added, each times a scale: 12 roundings of numbers up to the sum A of their sizes.
    The mean adds a chain of at most 40 (in a lane, over a warp, over warps; or in a SIMD lane). So sum minus
    mean is wrong by 52 units of A, and of z = (sum - mean) / deviation that changes 1 / deviation of it
    directly, and z times as much through the deviation. Variance, root, quotient and the last operations:
    64 units of the result. Then one rounding to the dtype of the output.
    """
    expected = expected_merge(case, tables)
    assert actual.shape == expected.shape and actual.dtype == tables.positions.dtype
    if not expected.numel():
        return
    weight, bias = tables.weight.double(), tables.bias.double()
    sums = expected_sums(case, tables)
    deviation = (sums.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
    largest = 6 * max(float(part.abs().max()) for part in _all_rows(tables))
    scaled = (expected - bias).abs()
    units = 52 * largest / deviation * (weight.abs() + scaled) + 64 * scaled + bias.abs()
    exact = FLOAT32_UNIT * units
    rounding = FLOAT32_UNIT if actual.dtype is torch.float32 else torch.finfo(actual.dtype).eps / 2
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    bound = exact + rounding * (expected.abs() + exact) + smallest
    wrong = ((actual.double() - expected).abs() > bound).nonzero()
    assert not wrong.numel(), f"{len(wrong)} elements too far off, first at {wrong[0].tolist()}"


def _all_rows(tables: Tables) -> Iterator[Tensor]:
    for t, table in enumerate(tables.rows):
        yield from (tables.row(t << 40 | row) for row in range(table.shape[0]))
    yield from (part.double() for part in (*tables.unigrams, tables.positions))
