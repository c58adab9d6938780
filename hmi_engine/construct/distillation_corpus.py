"""Unlabelled text as batches of token ids, and which of its n-grams a table would lack."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.distillation_settings import DistillationSettings
from hmi_engine.errors import CorpusError
from hmi_engine.models.packing import PackedSequences, window_tokens
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["DistillationBatch", "DistillationCorpus", "Misses", "read_pieces"]

MIN_TOKENS = 4
"""Of a piece, the special tokens included: shorter ones hold no n-gram of their own."""
TEXTS_PER_CALL = 1024
HELD_OUT_BLOCK = 32
"""Pieces held out side by side, as corpora repeat sentences in neighbouring lines."""


@dataclass(frozen=True)
class Misses:
    """For each token t of packed sequences, whether n-grams count as missing, both bool [T].

    Attributes:
        pairs: tokens t and t + 1; false at the end of a sequence.
        windows: the store's window at t. The same for bigram windows; a trigram window at an end of its
            sequence is the pair there.
    """

    pairs: Tensor
    windows: Tensor

    @classmethod
    def none(cls, num_tokens: int) -> Misses:
        """Every n-gram is found."""
        found = torch.zeros(num_tokens, dtype=torch.bool)
        return cls(found, found)

    def select(self, tokens: Tensor) -> Misses:
        """Those of some tokens, int64 [M]."""
        return Misses(self.pairs[tokens], self.windows[tokens])


@dataclass(frozen=True)
class DistillationBatch:
    """Pieces of similar length. A batch has the same pieces in every epoch.

    Attributes:
        number: of the batch.
        sequences: its pieces.
        misses: n-grams that a table made without them would lack.
    """

    number: int
    sequences: PackedSequences
    misses: Misses


class DistillationCorpus:
    """Batches to learn from, and batches held out."""

    def __init__(self, pieces: Sequence[list[int]], window: int, settings: DistillationSettings) -> None:
        """Splits pieces (lists of token ids in the order of the text) and forms batches.

        Raises:
            CorpusError: fewer than two pieces.
        """
        if len(pieces) < 2:
            raise CorpusError(
                f"the corpus gives {len(pieces)} sequences of at least {MIN_TOKENS} tokens; distillation "
                "needs at least two (one is held out), and thousands to learn something: give more text"
            )
        generator = torch.Generator().manual_seed(settings.seed)
        held_out = _held_out(len(pieces), settings.held_out_fraction, generator)
        sequences = PackedSequences.pack(list(pieces))
        misses = _cross_fitted(sequences, held_out, window, settings)
        digest = hashlib.sha256(sequences.input_ids.numpy().tobytes())
        self.sha256 = hashlib.sha256(digest.digest() + sequences.offsets.numpy().tobytes()).hexdigest()
        self.training = _batches(sequences, misses, ~held_out, settings.batch_tokens, generator)
        self.held_out = _batches(sequences, misses, held_out, settings.batch_tokens, generator)
        self.window = window

    @property
    def batches(self) -> list[DistillationBatch]:
        """All batches; those held out are numbered from ``len(training)`` on."""
        first = len(self.training)
        return self.training + [
            DistillationBatch(first + batch.number, batch.sequences, batch.misses) for batch in self.held_out
        ]

    def held_out_miss_rate(self) -> float:
        """Share of the held-out windows that the training text does not hold often enough."""
        missing = sum(int(batch.misses.windows.sum()) for batch in self.held_out)
        last = sum(batch.sequences.num_sequences for batch in self.held_out) if self.window == 2 else 0
        return missing / max(1, sum(batch.sequences.num_tokens for batch in self.held_out) - last)


def read_pieces(texts: Iterable[str], encoder: TextEncoder, max_tokens: int) -> tuple[list[list[int]], int]:
    """Tokenizes texts, each once, and cuts long ones into pieces with the special tokens around each.

    Returns:
        The pieces, of :data:`MIN_TOKENS` to ``max_tokens`` tokens, and how many distinct texts there were.

    Raises:
        CorpusError: there are texts, and none is long enough.
    """
    limit = min(max_tokens, encoder.max_tokens)
    distinct = dict.fromkeys(texts)
    pieces: list[list[int]] = []
    for batch in _runs(list(distinct), TEXTS_PER_CALL):
        for ids in encoder.token_ids(batch, whole=True):
            pieces.extend(_cut(ids, limit))
    if distinct and not pieces:
        raise CorpusError(
            f"none of the corpus' {len(distinct)} texts has {MIN_TOKENS} tokens (special tokens included), "
            "so there is no n-gram to learn from; give longer texts, such as whole sentences a line"
        )
    return pieces, len(distinct)


def _runs(texts: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def _cut(ids: list[int], limit: int) -> Iterator[list[int]]:
    """Pieces of one text; its first and last token, the special ones, go around each."""
    inner = ids[1:-1]
    for start in range(0, len(inner), limit - 2):
        piece = [ids[0], *inner[start : start + limit - 2], ids[-1]]
        if len(piece) >= MIN_TOKENS:
            yield piece


def _held_out(num_pieces: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Which pieces are held out, bool [num_pieces]: blocks of neighbours, at least one piece, never all."""
    wanted = min(max(1, round(num_pieces * fraction)), num_pieces - 1)
    size = min(HELD_OUT_BLOCK, wanted)
    starts = torch.randperm(num_pieces // size, generator=generator)[: wanted // size] * size
    held_out = torch.zeros(num_pieces, dtype=torch.bool)
    held_out[(starts[:, None] + torch.arange(size)).flatten()] = True
    return held_out


def _cross_fitted(
    sequences: PackedSequences, held_out: Tensor, window: int, settings: DistillationSettings
) -> Misses:
    """N-grams that a table of ``min_count`` would lack without a piece's own fold, or without held-out ones.

    Folds are blocks of neighbouring pieces, as in :mod:`hmi_engine.construct.crossfit`.
    """
    lengths = torch.tensor(sequences.lengths)
    fold_of_piece = torch.arange(len(lengths)) * settings.folds // len(lengths)
    fold_of_piece[held_out] = settings.folds  # counted nowhere
    folds = torch.repeat_interleave(fold_of_piece, lengths)
    pair_keys = hmi_kernels.ngram_keys(window_tokens(sequences, 2))
    pairs = _rare_elsewhere(pair_keys, folds, settings)
    last = sequences.offsets[1:] - 1
    pairs[last] = False
    if window == 2:
        return Misses(pairs, pairs)
    windows = _rare_elsewhere(hmi_kernels.ngram_keys(window_tokens(sequences, 3)), folds, settings)
    first = sequences.offsets[:-1]
    windows[first], windows[last] = pairs[first], pairs[last - 1]
    return Misses(pairs, windows)


def _rare_elsewhere(keys: Tensor, folds: Tensor, settings: DistillationSettings) -> Tensor:
    """For each occurrence whether its n-gram occurs fewer than ``min_count`` times in the other folds."""
    _, ngrams = keys.unique(return_inverse=True)
    columns = settings.folds + 1
    by_fold = torch.bincount(ngrams * columns + folds, minlength=int(ngrams.max() + 1) * columns)
    by_fold = by_fold.view(-1, columns)
    by_fold[:, settings.folds] = 0
    elsewhere = by_fold.sum(1)[ngrams] - by_fold.flatten()[ngrams * columns + folds]
    return elsewhere < settings.min_count


def _batches(
    sequences: PackedSequences,
    misses: Misses,
    chosen: Tensor,
    batch_tokens: int,
    generator: torch.Generator,
) -> list[DistillationBatch]:
    """Chosen pieces by length (of equal ones in random order), as many a batch as ``batch_tokens`` allows."""
    lengths = torch.tensor(sequences.lengths)
    pieces = chosen.nonzero()[:, 0]
    pieces = pieces[torch.randperm(len(pieces), generator=generator)]
    pieces = pieces[lengths[pieces].argsort(stable=True)]
    batches: list[DistillationBatch] = []
    members: list[int] = []
    for piece in pieces.tolist():
        if members and (len(members) + 1) * sequences.lengths[piece] > batch_tokens:
            batches.append(_batch(len(batches), sequences, misses, members))
            members = []
        members.append(piece)
    return [*batches, _batch(len(batches), sequences, misses, members)]


def _batch(number: int, sequences: PackedSequences, misses: Misses, members: list[int]) -> DistillationBatch:
    starts = sequences.offsets.tolist()
    tokens = torch.cat([torch.arange(starts[piece], starts[piece + 1]) for piece in members])
    lengths = tuple(sequences.lengths[piece] for piece in members)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = PackedSequences(sequences.input_ids[tokens], offsets, lengths)
    return DistillationBatch(number, packed, misses.select(tokens))
