"""Look-up and merge of a decoder's rows, against a dictionary and torch's LayerNorm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import hmi_kernels

HIDDEN = 24


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_table(ngrams: list[tuple[int, ...]]) -> torch.Tensor:
    padded = [[*ngram, *[-1] * (3 - len(ngram))] for ngram in ngrams]
    return hmi_kernels.plot_index_build(hmi_kernels.ngram_keys(int32(padded).view(-1, 3)))


def windows_of(tokens: list[int]) -> list[list[int]]:
    """The window of each token of a text: the token and up to two before it, absent ones at the end."""
    return [
        [*tokens[max(0, t - 2) : t + 1], *[-1] * (2 - t)] if t < 2 else tokens[t - 2 : t + 1]
        for t in range(len(tokens))
    ]


def expected_references(window, tables, chain):
    """By the meaning: the n-gram in the first table of the chain that has it, then the shorter one."""
    present = tuple(token for token in window if token >= 0)

    def find(ngram):
        if len(ngram) < 2:
            return -1
        for number in chain:
            if number < 0:
                return -1
            if ngram in tables[number]:
                return number << hmi_kernels.ROW_BITS | tables[number].index(ngram)
        return -1

    whole = find(present)
    return [whole, find(present[1:]) if whole < 0 and len(present) == 3 else -1]


NGRAMS = st.lists(st.integers(0, 3), min_size=2, max_size=3).map(tuple)


@settings(max_examples=60)
@given(
    st.lists(st.lists(NGRAMS, unique=True, max_size=8), min_size=2, max_size=2),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.sampled_from([[0, 1], [1, 0], [1, -1], [-1, 0]]), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_finds_what_a_dictionary_finds(backend, tables, tokens, chains, random):
    windows = windows_of(tokens)
    token_chains = [random.randrange(len(chains)) for _ in windows]
    with hmi_kernels.use_backend(backend):
        found = hmi_kernels.causal_lookup(
            int32(windows), [make_table(table) for table in tables], int32(chains), int32(token_chains)
        )
    expected = [
        expected_references(window, tables, chains[chain])
        for window, chain in zip(windows, token_chains, strict=True)
    ]
    assert found.tolist() == expected


def test_many_tokens_in_parallel(implementation):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 12, (9_000,), generator=generator).tolist()
    ngrams = sorted(
        {tuple(tokens[i : i + 2]) for i in range(100)} | {tuple(tokens[i : i + 3]) for i in range(400)}
    )
    windows = windows_of(tokens)
    found = hmi_kernels.causal_lookup(
        int32(windows), [make_table(ngrams)], int32([[0]]), int32([0] * len(windows))
    )
    for t in (0, 1, 2, 31, 32, 2047, 2048, 2049, 8_999):
        assert found[t].tolist() == expected_references(windows[t], [ngrams], [0])


@pytest.mark.parametrize(
    "window", [[-1, 1, 2], [1, -1, 2], [-1, -1, -1], [1, 2, -2], [1, hmi_kernels.MAX_TOKEN_ID + 1, -1]]
)
def test_windows_that_no_text_has(window, implementation):
    with pytest.raises(ValueError, match="windows"):
        hmi_kernels.causal_lookup(int32([window]), [make_table([(1, 2)])], int32([[0]]), int32([0]))


@pytest.mark.parametrize(
    ("chains", "token_chains"), [([[1]], [0]), ([[-2]], [0]), ([[0]], [1]), ([[0]], [-1])]
)
def test_chains_that_do_not_exist(chains, token_chains, implementation):
    with pytest.raises(ValueError, match="chains"):
        hmi_kernels.causal_lookup(
            int32([[1, 2, -1]]), [make_table([(1, 2)])], int32(chains), int32(token_chains)
        )


def merge_arguments(rows, unigrams, references, ids, positions):
    return {
        "input_ids": int32(ids),
        "positions": torch.tensor(positions),
        "references": torch.tensor(references),
        "row_tables": rows,
        "unigram_tables": unigrams,
        "token_unigram_tables": int32([0] * len(ids)),
        "position_embeddings": torch.randn(8, HIDDEN),
        "layer_norm_weight": torch.randn(HIDDEN),
        "layer_norm_bias": torch.randn(HIDDEN),
        "layer_norm_eps": 1e-5,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge_takes_the_first_row_that_is_there(dtype, implementation):
    rows = [torch.randn(3, 1, HIDDEN).to(dtype), torch.randn(2, 1, HIDDEN).to(dtype)]
    unigrams = [torch.randn(5, 1, HIDDEN).to(dtype)]
    second = 1 << hmi_kernels.ROW_BITS | 1
    arguments = merge_arguments(rows, unigrams, [[2, -1], [-1, second], [-1, -1]], [4, 0, 3], [7, 0, 2])
    found = hmi_kernels.causal_merge(**arguments)
    chosen = torch.stack([rows[0][2, 0], rows[1][1, 0], unigrams[0][3, 0]]).float()
    expected = functional.layer_norm(
        chosen + arguments["position_embeddings"][arguments["positions"]],
        (HIDDEN,),
        arguments["layer_norm_weight"],
        arguments["layer_norm_bias"],
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_merge_of_compressed_rows(implementation):
    rows = torch.randn(6, 1, HIDDEN)
    quantized, scales = hmi_kernels.quantize_rows(rows)
    codebooks = torch.randn(1, HIDDEN // 4, 256, 4).half()
    codes = torch.randint(0, 256, (6, 1, HIDDEN // 4), dtype=torch.uint8)
    decoded = codebooks[0, torch.arange(HIDDEN // 4), codes[:, 0].long()].flatten(1).float()
    numbered = [[i, -1] for i in range(6)] + [[1 << hmi_kernels.ROW_BITS | i, -1] for i in range(6)]
    arguments = merge_arguments([quantized, codes], [torch.zeros(2, 1, HIDDEN)], numbered, [0] * 12, [1] * 12)
    found = hmi_kernels.causal_merge(
        **arguments,
        row_scales=[scales, torch.empty(0)],
        codebooks=[torch.empty(0, dtype=torch.float16), codebooks],
    )
    plain = torch.cat([quantized.float() * scales.unsqueeze(2), decoded.unsqueeze(1)])
    numbered = [[i, -1] for i in range(12)]
    expected = hmi_kernels.causal_merge(
        **arguments | {"row_tables": [plain], "references": torch.tensor(numbered)}
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": torch.tensor([8])},
        {"positions": torch.tensor([-1])},
        {"input_ids": int32([5])},
        {"references": torch.tensor([[3, -1]])},
        {"references": torch.tensor([[1 << hmi_kernels.ROW_BITS, -1]])},
        {"references": torch.tensor([[-2, -1]])},
        {"token_unigram_tables": int32([1])},
    ],
)
def test_merge_refuses_what_lies_outside(change, implementation):
    rows, unigrams = [torch.randn(3, 1, HIDDEN)], [torch.randn(5, 1, HIDDEN)]
    arguments = merge_arguments(rows, unigrams, [[-1, -1]], [4], [0])
    hmi_kernels.causal_merge(**arguments)
    with pytest.raises(ValueError, match=r"positions|table|row|references"):
        hmi_kernels.causal_merge(**arguments | change)
