"""Cross-fitted lookups against counting by hand, and the hit rates that they are for."""

from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
import torch

import hmi_kernels
from hmi_engine.construct.crossfit import CrossFitter, count_hits
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences

FOLDS = 3


def open_plots(store):
    return PlotLibrary(store.layout, store.catalog, store.general).reading(list(store.domains))


def slots_of_key(key):
    return tuple(hmi_kernels.ngram_tokens(torch.tensor([key]))[0].tolist())


class CountedByHand:
    """What a table would hold without the texts of one fold: n-grams as tuples, absent slots -1."""

    def __init__(self, store, domain, corpus, window):
        self.encoder, self.window = store.encoder, window
        self.corpus = set(corpus)
        self.counts = self.count(corpus)
        table = open_plots(store).table(domain)
        self.admission = table.metadata.admission_count
        self.held = {slots_of_key(key) for key in table.row_keys.tolist()}

    def count(self, texts):
        counts = Counter()
        for ids in self.encoder.token_ids(list(texts)):
            for pair in pairwise(ids):
                counts[(*pair, -1)] += 1
                if self.window == 3:
                    counts[(-1, *pair)] += 1
            if self.window == 3:
                counts.update(zip(ids, ids[1:], ids[2:], strict=False))
        return counts

    @cache  # noqa: B019 - lives as long as the test
    def own_count(self, texts):
        return self.count(texts)

    def holds(self, gram, text, fold_texts):
        if gram not in self.held:
            return False
        if text not in self.corpus:
            return True
        own = self.own_count(frozenset(fold_texts) & self.corpus)
        return own[gram] == 0 or self.counts[gram] - own[gram] >= self.admission


def windows_of(ids, window):
    """The n-grams that a position looks up, by column."""
    for t, token in enumerate(ids):
        before = ids[t - 1] if t else -1
        after = ids[t + 1] if t + 1 < len(ids) else -1
        if window == 2:
            yield [(token, after, -1) if after >= 0 else None]
        else:
            left = (before, token, -1) if before >= 0 else None
            right = (-1, token, after) if after >= 0 else None
            yield [(before, token, after), left, right]


def expected_hits(tables, texts, token_ids, window):
    folds = [
        texts[start : start + len(texts) // FOLDS] for start in range(0, len(texts), len(texts) // FOLDS)
    ]
    for number, (text, ids) in enumerate(zip(texts, token_ids, strict=True)):
        fold = folds[number * FOLDS // len(texts)]
        for grams in windows_of(ids, window):
            found = [
                gram is not None and any(table.holds(gram, text, fold) for table in tables) for gram in grams
            ]
            # plot_lookup looks bigrams up only where the whole window is missing
            yield [found[0], *(hit and not found[0] for hit in found[1:])]


def all_references(plots, fitter, token_ids):
    sequences = PackedSequences.pack(token_ids)
    return sequences, *fitter.lookup(sequences, range(len(token_ids)))


@pytest.mark.parametrize("window", [2, 3])
def test_equal_to_counting_by_hand(make_store, make_sentences, window):
    store = make_store(window=window)
    corpus = make_sentences(120, seed=1, longest=9)
    store.add_domain("words", corpus[:80], min_count=3)
    store.add_domain("words/more", corpus[40:], parent="words", min_count=2)
    texts = [*corpus[30:90], *make_sentences(12, seed=5, longest=9)]
    token_ids = store.encoder.token_ids(texts)
    plots = open_plots(store)
    fitter = CrossFitter(plots, "words/more", texts, token_ids, window=window, folds=FOLDS)
    sequences, plain, references = all_references(plots, fitter, token_ids)

    own = CountedByHand(store, "words/more", corpus[40:], window)
    parent = CountedByHand(store, "words", corpus[:80], window)
    expected = torch.tensor(list(expected_hits([own, parent], texts, token_ids, window)))
    assert torch.equal(references >= 0, expected)
    assert fitter.texts_in_corpus == 60
    kept = references >= 0
    if window == 2:
        assert torch.equal(references[kept], plain[kept])
    keys = plots.row_keys(references)
    grams = [grams for ids in token_ids for grams in windows_of(ids, window)]
    for place in kept.nonzero().tolist():
        assert slots_of_key(keys[tuple(place)].item()) == grams[place[0]][place[1]]
    counts = count_hits(plain, references, sequences, window)
    assert counts[1] == int(expected[:, 0].sum()) < counts[0]
    assert counts[2] == sum(len(ids) - (window == 2) for ids in token_ids)


@pytest.mark.parametrize("window", [2, 3])
def test_new_texts_keep_all_rows(make_store, make_sentences, corpus, window):
    store = make_store(window=window)
    store.add_domain("words", corpus)
    texts = [text for text in make_sentences(20, seed=11) if text not in corpus]
    token_ids = store.encoder.token_ids(texts)
    plots = open_plots(store)
    fitter = CrossFitter(plots, "words", texts, token_ids, window=window, folds=FOLDS)
    _, plain, references = all_references(plots, fitter, token_ids)
    assert fitter.texts_in_corpus == 0
    assert torch.equal(plain, references)


def test_domain_without_text(make_store):
    store = make_store()
    plots = open_plots(store)
    fitter = CrossFitter(plots, "general", ["the cell"], [[1, 2]], window=2, folds=FOLDS)
    _, _, references = all_references(plots, fitter, [[1, 2]])
    assert (references == -1).all()


@pytest.mark.parametrize("window", [2, 3])
def test_hit_rate_is_that_of_held_out_text(make_store, make_sentences, window):
    """What cross-fitting is for: training sees as many hits as serving, not the many of its own corpus."""
    store = make_store(window=window)
    training = make_sentences(600, seed=1, longest=12)
    held_out = [text for text in make_sentences(300, seed=2, longest=12) if text not in training]
    store.add_domain("words", training, min_count=1)
    plots = open_plots(store)

    def rates(texts):
        token_ids = store.encoder.token_ids(texts)
        fitter = CrossFitter(plots, "words", texts, token_ids, window=window, folds=5)
        sequences, plain, references = all_references(plots, fitter, token_ids)
        looked_up, cross_fitted, windows = count_hits(plain, references, sequences, window)
        return looked_up / windows, cross_fitted / windows

    naive, cross_fitted = rates(training)
    unseen, same = rates(held_out)
    assert unseen == same
    assert naive == 1.0  # every n-gram of its own corpus is in the table
    assert abs(cross_fitted - unseen) < 0.03
    assert unseen < 0.9
