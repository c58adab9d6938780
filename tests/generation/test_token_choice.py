"""Tokens are chosen as transformers' processors say, and draws depend on the seed alone."""

import random
import types

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hmi_engine.generation import token_choice
from hmi_engine.generation.token_choice import NextToken, TokenChooser
from hmi_engine.sampling import Sampling

NUM_POINTS = 100


def logit_rows(longest=12):
    """No two logits are equal: how ties are broken is nobody's promise."""
    values = st.lists(st.integers(-300, 300), min_size=1, max_size=longest, unique=True)
    return values.map(lambda row: torch.tensor(row) / 37.0)


@st.composite
def rows_and_seen(draw):
    """Logits, and tokens that were there before, some of them often."""
    logits = draw(logit_rows())
    return logits, draw(st.lists(st.integers(0, len(logits) - 1), max_size=20))


PENALTIES = st.sampled_from([0.3, 1.0, 1.2, 5.0])


def following(logits):
    return NextToken(logits, int(logits.argmax()))


def penalized(logits, seen, penalty):
    """By transformers."""
    before = torch.tensor([seen], dtype=torch.int64)
    return RepetitionPenaltyLogitsProcessor(penalty)(before, logits[None].clone())[0]


def warped(scores, sampling):
    """By transformers, in the order of its ``generate``."""
    warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores = scores[None].clone()
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0]


def swept_shares(logits, seen, sampling):
    """How large a part of all numbers from 0 to 1 leads to each token."""
    points = iter([(point + 0.5) / NUM_POINTS for point in range(NUM_POINTS)])
    source = types.SimpleNamespace(random=lambda: next(points))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_choice, "random", types.SimpleNamespace(Random=lambda _: source))
        chooser = TokenChooser(sampling)
    drawn = [chooser.choose(following(logits), seen).token_id for _ in range(NUM_POINTS)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / NUM_POINTS


@given(rows_and_seen(), PENALTIES)
def test_greedy_takes_the_likeliest_after_the_penalty(row, penalty):
    logits, seen = row
    scores = penalized(logits, seen, penalty)
    assume(len(scores) == 1 or -torch.diff(scores.topk(2).values) > 1e-4)
    given_logits = logits.clone()
    chosen = TokenChooser(Sampling(repetition_penalty=penalty)).choose(following(logits), seen)
    assert chosen.token_id == scores.argmax()
    assert torch.equal(logits, given_logits), "the caller's logits are left alone"


@settings(max_examples=40, deadline=None)
@given(
    rows_and_seen(),
    st.sampled_from([0.2, 1, 1.0, 4.0]),
    st.none() | st.integers(1, 14),
    st.sampled_from([1e-3, 0.3, 0.7, 0.95, 1.0]),
    PENALTIES,
)
def test_every_token_has_the_probability_that_transformers_gives_it(row, temperature, top_k, top_p, penalty):
    logits, seen = row
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    scores = penalized(logits, seen, penalty)
    ordered = scores.double().sort().values
    assume(bool((torch.diff(ordered) > 1e-4).all()))
    most = ordered[-top_k:] if top_k else ordered
    sums = (most / temperature).softmax(0).cumsum(0)
    assume(bool(((sums - (1 - top_p)).abs() > 1e-5).all()) or top_p == 1)  # float32 may fall on either side
    expected = warped(scores, sampling).double().softmax(0)
    found = swept_shares(logits, seen, sampling)
    # The points that lead to a token are neighbours, so that their number is right to less than one.
    assert (found - expected).abs().max() <= 1.001 / NUM_POINTS
    assert not found[expected == 0].any()


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6}])
def test_draws_of_a_seed_follow_the_probabilities(settings):
    sampling = Sampling(temperature=1.5, seed=11, **settings)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    chooser = TokenChooser(sampling)
    drawn = torch.tensor([chooser.choose(following(logits), []).token_id for _ in range(3000)])
    expected = warped(logits, sampling).double().softmax(0)
    counts = torch.bincount(drawn, minlength=12)
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0
    assert stats.chisquare(counts[is_possible], expected[is_possible] * 3000).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_the_colder_the_surer(temperature):
    logits = torch.tensor([-100.0, 30.0, 31.0, -2.0])
    chooser = TokenChooser(Sampling(temperature=temperature, seed=0))
    assert {chooser.choose(following(logits), []).token_id for _ in range(50)} == {2}
    assert {chooser.choose(following(-logits), []).token_id for _ in range(50)} == {0}


@pytest.mark.parametrize("temperature", [1e30, 1e300, 10**300], ids=["1e30", "1e300", "integer"])
def test_the_hotter_the_more_alike(temperature):
    shares = swept_shares(torch.tensor([-100.0, 30.0, 31.0, -2.0]), [], Sampling(temperature=temperature))
    assert torch.allclose(shares, torch.full((4,), 0.25))


@given(st.integers(), st.lists(st.sampled_from(["own", "other", "python", "torch"]), max_size=30))
def test_a_seed_gives_its_tokens_whatever_is_drawn_between(seed, order):
    logits = torch.zeros(1000)
    sampling = Sampling(temperature=1.0, seed=seed)
    alone = TokenChooser(sampling)
    chooser, other = TokenChooser(sampling), TokenChooser(Sampling(temperature=1.0, seed=seed + 1))
    others = {
        "other": lambda: other.choose(following(logits), []),
        "python": random.random,
        "torch": lambda: torch.rand(1),
    }
    for each in order:
        if each == "own":
            assert chooser.choose(following(logits), []) == alone.choose(following(logits), [])
        else:
            others[each]()


def test_without_a_seed_every_text_is_another():
    logits = torch.zeros(1000)
    choosers = [TokenChooser(Sampling(temperature=1.0, seed=seed)) for seed in (None, None, 1, 2)]
    drawn = {tuple(chooser.choose(following(logits), []).token_id for _ in range(10)) for chooser in choosers}
    assert len(drawn) == 4


@given(rows_and_seen(), st.sampled_from([0.0, 0.5, 3.0]), PENALTIES)
def test_log_probabilities_are_those_of_the_model(row, temperature, penalty):
    logits, seen = row
    settings = {"temperature": temperature, "repetition_penalty": penalty}
    chosen = TokenChooser(Sampling(**settings, logprobs=True)).choose(following(logits), seen)
    expected = torch.log_softmax(logits.double(), 0)[chosen.token_id]
    assert chosen.logprob == pytest.approx(float(expected), abs=1e-5)
    assert TokenChooser(Sampling(**settings)).choose(following(logits), seen).logprob is None
