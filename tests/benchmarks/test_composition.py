"""The composition study: today's rules are the engine's; counts, fits and probe are right."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.composition as composition
import hmi_kernels
from benchmarks.arguments import Arguments
from benchmarks.composition_fits import fit_diagonal, fit_linear, fit_scalars, probe, relative_error
from benchmarks.composition_probes import most_frequent
from benchmarks.composition_rules import Held, corrected
from benchmarks.composition_study import (
    DROPPED,
    PAIR_RULES,
    PLACEHOLDER,
    TRIPLE_RULES,
    Study,
    open_study,
)
from benchmarks.composition_tasks import general_info
from benchmarks.composition_texts import FOLDS, Sizes, TextSet, folder_sets, prepare
from hmi_engine.construct.materialise import compute_unigrams
from hmi_engine.knowledge.examples import Example
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_loading import import_bert
from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.models.windows import fill_places

MASK = 4
PLOT_LAYERS = 2
SIZES = Sizes(train=60, test=30, max_tokens=12)


WORDS = ("the", "a", "in", "ab", "cab", "bead", "fig", "of")


def sentences(count: int, seed: int) -> list[str]:
    """Texts of 1 to 6 words; short words soon repeat, so a small corpus holds many bigrams twice."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 6))) for _ in range(count)]


def labelled(texts: list[str]) -> tuple[Example, ...]:
    return tuple(
        Example(text, "the" if "the" in text.split() else "none", number)
        for number, text in enumerate(texts, start=1)
    )


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> TextEncoder:
    return TextEncoder(tiny_bert, 48)


@pytest.fixture(scope="module")
def text_set() -> TextSet:
    corpus = list(dict.fromkeys(sentences(200, seed=1)))
    held_out = [text for text in sentences(60, seed=2) if text not in corpus]
    return TextSet("words", labelled(corpus[:60]), labelled(held_out[:30]), tuple(corpus))


@pytest.fixture(scope="module")
def study(tiny_bert: Path, text_set: TextSet, encoder: TextEncoder, tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("composition") / "general"
    import_bert(str(tiny_bert), folder)
    model = HierarchicalBert.load(folder, PLOT_LAYERS)
    with torch.no_grad():
        return open_study(model, prepare(text_set, encoder, SIZES), MASK)


def some_table(study: Study) -> Held:
    return Held.of(study.rows, study.texts.pairs.held_at_random(0.6), study.texts.triples.held_at_random(0.4))


def engine_inputs(study: Study, tokens: torch.Tensor, *, window: int) -> torch.Tensor:
    """The engine's merge on a table of the windows int32 [n, window], in plain torch."""
    model, sequences = study.model, study.texts.sequences
    index = hmi_kernels.plot_index_build(hmi_kernels.ngram_keys(tokens))
    general = general_info(model, "").model_copy(
        update={"window": window, "placeholder_token_id": MASK, "row_dtype": "float32"}
    )
    unigrams = compute_unigrams(model.window_states, general)
    chains = torch.zeros(sequences.num_sequences, 1, dtype=torch.int32)
    with hmi_kernels.use_backend("reference"), torch.no_grad():
        references = hmi_kernels.plot_lookup(
            sequences.input_ids,
            sequences.offsets,
            [index],
            chains,
            window=window,
        )
        return hmi_kernels.plot_merge(
            sequences.input_ids,
            sequences.offsets,
            references,
            [model.window_states(fill_places(tokens, MASK))],
            [unigrams],
            chains[:, 0].contiguous(),
            model.merge_positions,
            model.merge_norm.weight,
            model.merge_norm.bias,
            layer_norm_eps=model.merge_norm.eps,
            window=window,
        )


def windows_of(study: Study, held: Held, *, window: int) -> torch.Tensor:
    """The distinct windows that a table has, -1 where absent: with width 3, bigrams of both sides too."""
    found = set()
    place = 0
    pairs, triples = held.pairs[:, 0].tolist(), held.triples[:, 0].tolist()
    for ids in study.texts.sequences.input_ids.split(study.texts.sequences.lengths):
        padded = [-1, *ids.tolist(), -1]
        for before, token, after in zip(padded[:-2], padded[1:-1], padded[2:], strict=True):
            if pairs[place]:
                found |= {(token, after)} if window == 2 else {(token, after, -1), (-1, token, after)}
            if window == 3 and triples[place] and before >= 0 and after >= 0:
                found.add((before, token, after))
            place += 1
    return torch.tensor(sorted(found), dtype=torch.int32)


@pytest.mark.parametrize(("window", "rule"), [(2, PLACEHOLDER), (3, "additive, placeholder everywhere")])
def test_the_best_rules_are_the_engines(study: Study, window: int, rule: str) -> None:
    held = some_table(study)
    merged = (PAIR_RULES if window == 2 else TRIPLE_RULES)[rule](study)(held)
    expected = engine_inputs(study, windows_of(study, held, window=window), window=window)
    compared = torch.ones(len(expected), dtype=torch.bool)
    if window == 3:  # the study leaves places outside the text empty, the engine fills them
        offsets = study.texts.sequences.offsets
        for place in (offsets[:-1], offsets[:-1] + 1, offsets[1:] - 1, offsets[1:] - 2):
            compared[place.clamp(0, len(compared) - 1)] = False
    assert compared.sum() > 20
    torch.testing.assert_close(study.inputs(merged)[compared], expected[compared], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rules", [PAIR_RULES, TRIPLE_RULES])
def test_no_rule_changes_what_is_held(study: Study, rules) -> None:
    exact = next(iter(rules.values()))(study)(study.everything())
    for prepare_rule in rules.values():
        torch.testing.assert_close(prepare_rule(study)(study.everything()), exact)


def test_placeholder_rows_stand_in_for_missing_sides(study: Study) -> None:
    ids = study.texts.sequences.input_ids
    masks = torch.full_like(ids, MASK)
    left = study.model.window_states(torch.stack([masks, ids], dim=1))[:, 1]
    right = study.model.window_states(torch.stack([ids, masks], dim=1))[:, 0]
    alone = study.model.window_states(ids[:, None])[:, 0]
    inside = (study.rows.has_left & study.rows.has_right)[:, 0]
    merged = PAIR_RULES[PLACEHOLDER](study)(study.nothing())
    torch.testing.assert_close(merged[inside], (left + right - alone)[inside], atol=1e-5, rtol=1e-5)


def test_a_corrected_bigram_merge_is_the_trigrams_own_state(study: Study) -> None:
    inside = (study.rows.has_left & study.rows.has_right)[:, 0]
    merged = PAIR_RULES[DROPPED](study)(study.everything())
    everywhere = torch.ones_like(inside)
    own = corrected(study.rows, merged, everywhere, slots="own token")
    torch.testing.assert_close(own[inside], study.rows.triple.slot(1)[inside], atol=1e-5, rtol=1e-5)
    nowhere = corrected(study.rows, merged, ~everywhere, slots="all three")
    torch.testing.assert_close(nowhere, merged)


def test_counts_leave_out_the_own_fold(text_set: TextSet, encoder: TextEncoder) -> None:
    texts = prepare(text_set, encoder, SIZES)
    folds: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(FOLDS)]
    for number, ids in enumerate(encoder.token_ids(list(text_set.corpus))):
        folds[number % FOLDS].update(itertools.pairwise(ids))
    everything = sum(folds, Counter())
    counts, keys = texts.pairs.counts.tolist(), texts.pairs.keys.tolist()
    place = 0
    for text, ids in zip(
        (*texts.train.encoded.texts, *texts.test.encoded.texts),
        (*texts.train.encoded.token_ids, *texts.test.encoded.token_ids),
        strict=True,
    ):
        own = folds[text_set.corpus.index(text) % FOLDS] if text in text_set.corpus else Counter()
        for pair in itertools.pairwise(ids):
            assert counts[place] == everything[pair] - own[pair]
            place += 1
        assert keys[place] == 0  # the last token starts no bigram
        place += 1
    assert texts.pairs.all_counts.tolist() == sorted(everything.values(), reverse=True)


def test_random_tables_grow_and_hold_each_ngram_everywhere_or_nowhere(study: Study) -> None:
    pairs = study.texts.pairs
    smaller, larger = pairs.held_at_random(0.3), pairs.held_at_random(0.7)
    assert not bool((smaller & ~larger).any())
    assert not bool(pairs.held_at_random(0.0).any())
    assert torch.equal(pairs.held_at_random(1.0), pairs.keys != 0)
    for held in (smaller, larger):
        assert set(pairs.keys[held].tolist()).isdisjoint(pairs.keys[~held].tolist())


def test_a_budget_admits_the_most_frequent(study: Study) -> None:
    pairs, values = study.texts.pairs, 64
    assert not bool(most_frequent(pairs, 0, values).any())
    assert torch.equal(most_frequent(pairs, 1 << 40, values), pairs.held())
    few = most_frequent(pairs, 20 * (values * 2 + 48), values)
    assert bool((pairs.counts[few] >= int(pairs.all_counts[19])).all())


def test_fits_are_least_squares() -> None:
    torch.manual_seed(0)
    x, y, target = torch.randn(200, 5), torch.randn(200, 5), torch.randn(200, 5)
    flat = np.stack([x.flatten().numpy(), y.flatten().numpy()], axis=1)
    expected, *_ = np.linalg.lstsq(flat, target.flatten().numpy(), rcond=None)
    found = fit_scalars([x, y], target)
    np.testing.assert_allclose(torch.stack(found.weights).numpy(), expected, atol=1e-3)
    ones = np.ones((200, 1), dtype=np.float32)
    joint = np.concatenate([x.numpy(), y.numpy(), ones], axis=1)
    expected, *_ = np.linalg.lstsq(joint, target.numpy(), rcond=None)
    np.testing.assert_allclose(fit_linear([x, y], target)(x, y).numpy(), joint @ expected, atol=2e-3)
    diagonal = fit_diagonal([x, y], target)(x, y)
    for dimension in range(5):
        columns = np.stack([x[:, dimension], y[:, dimension], ones[:, 0]], axis=1)
        expected, *_ = np.linalg.lstsq(columns, target[:, dimension].numpy(), rcond=None)
        np.testing.assert_allclose(diagonal[:, dimension].numpy(), columns @ expected, atol=2e-3)


def test_the_probe_finds_linear_maps_and_nothing_in_noise() -> None:
    torch.manual_seed(0)
    states, matrix = torch.randn(4000, 8), torch.randn(8, 8)
    in_training = torch.arange(4000) % 2 == 0
    assert probe(states, states @ matrix + 3, in_training) > 0.999
    assert abs(probe(states, torch.randn(4000, 8), in_training)) < 0.02
    assert relative_error(states, states) == 0


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    generator = random.Random(0)
    for split, count, seed in (("train", 200, 3), ("dev", 20, 4), ("test", 60, 5)):
        path = tmp_path / "data" / "words" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = sentences(count, seed)
        lines = [{"text": text, "label": generator.choice(["yes", "no"])} for text in texts]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def test_folder_sets_hold_out_other_texts(data_folder: Path) -> None:
    (found,) = folder_sets(data_folder, SIZES)
    assert (found.name, len(found.train), len(found.test)) == ("words", 60, 30)
    assert {example.text for example in found.train} <= set(found.corpus)
    assert not {example.text for example in found.test} & set(found.corpus)


def test_the_whole_study(tiny_bert: Path, data_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(composition, "packaged_model", lambda: tiny_bert)
    result = composition.measure(Arguments(data_folder, tmp_path / "out.json", quick=True, command="test"))
    names = [quantity.name for quantity in result.quantities]
    assert len(names) == len(set(names))
    for rule in (*PAIR_RULES, *TRIPLE_RULES):
        assert any(name.startswith("row error") and rule in name for name in names)
        assert any(name.startswith("probe") and rule in name for name in names)
    assert all(np.isfinite(quantity.value) for quantity in result.quantities)
    accuracies = [item.value for item in result.quantities if item.name.startswith("accuracy, ")]
    assert accuracies and all(0 <= value <= 1 for value in accuracies)
    assert {curve.figure for curve in result.curves} >= {"coverage", "budget"}
