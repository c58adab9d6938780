"""The recorder against Counter: exact while there is room and time, bounded and honest where there is not."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_engine.errors import InvalidSizeError
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.packing import PackedSequences
from hmi_kernels import FrequencySketch, ngram_keys, ngram_tokens

TEXT = st.tuples(st.sampled_from("abc"), st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1))
BATCHES = st.lists(st.lists(TEXT, min_size=1, max_size=6), min_size=1, max_size=5)
LEAST_BYTES = 256 << 10


class Clock:
    """Time that goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def window_keys(ids: list[int], window: int) -> Counter[tuple[int, ...]]:
    pairs = Counter((a, b, -1) for a, b in pairwise(ids))
    if window == 2:
        return pairs
    return pairs + Counter((-1, a, b) for a, b in pairwise(ids)) + Counter(zip(ids, ids[1:], ids[2:]))  # noqa: B905


def as_counter(counts: TrafficCounts) -> dict[tuple[int, ...], float]:
    slots = map(tuple, ngram_tokens(counts.keys).tolist())
    return dict(zip(slots, counts.weights.tolist(), strict=True))


def record(recorder: TrafficRecorder, window: int, texts: list[tuple[str, list[tuple[int, bool]]]]) -> None:
    sequences = PackedSequences.pack([[token for token, _ in text] for _, text in texts])
    hits = torch.tensor([hit for _, text in texts for _, hit in text])
    if window == 2:
        hits[sequences.offsets[1:] - 1] = False
    recorder.record(sequences, [domain for domain, _ in texts], hits)


@settings(deadline=None, max_examples=60)
@given(window=st.sampled_from([2, 3]), batches=BATCHES)
def test_counts_equal_counter(window: int, batches: list[list[tuple[str, list[tuple[int, bool]]]]]) -> None:
    recorder = TrafficRecorder(window, clock=Clock())
    for texts in batches:
        record(recorder, window, texts)
    for domain in "abc":
        texts = [text for batch in batches for name, text in batch if name == domain]
        ends = 1 if window == 2 else 0  # the last token of a text opens no window of two
        true = sum((window_keys([token for token, _ in text], window) for text in texts), Counter())
        counts = recorder.drain(domain)
        assert as_counter(counts) == true
        assert (counts.occurrences, counts.max_error) == (true.total(), 0)
        assert counts.tokens == sum(map(len, texts))
        assert counts.windows == counts.tokens - ends * len(texts)
        assert counts.hits == sum(hit for text in texts for _, hit in text[: len(text) - ends])
        assert recorder.drain(domain).tokens == 0
    assert recorder.domains == ()


@settings(deadline=None, max_examples=60)
@given(window=st.sampled_from([2, 3]), batches=BATCHES, asked=st.sets(st.sampled_from("abcd")))
def test_weights_are_those_of_a_moment_ago(
    window: int, batches: list[list[tuple[str, list[tuple[int, bool]]]]], asked: set[str]
) -> None:
    recorder = TrafficRecorder(window, clock=Clock())
    earlier: dict[str, list[Counter[tuple[int, ...]]]] = {domain: [Counter()] for domain in "abcd"}
    tokens: dict[str, list[int]] = {domain: [0] for domain in "abcd"}
    for texts in batches:
        record(recorder, window, texts)
        for domain in "abcd":
            own = [[token for token, _ in text] for name, text in texts if name == domain]
            new = sum((window_keys(ids, window) for ids in own), Counter())
            earlier[domain].append(earlier[domain][-1] + new)
            tokens[domain].append(tokens[domain][-1] + sum(map(len, own)))
        slots = [*set().union(*(counts[-1] for counts in earlier.values())), (9, 9, 9)]
        found = recorder.weights_of(ngram_keys(torch.tensor(slots, dtype=torch.int32)), [*asked, *asked])
        for slot, weight in zip(slots, found.tolist(), strict=True):
            least = sum(counts_at(earlier[name], tokens[name])[slot] for name in asked)
            assert least <= weight <= sum(earlier[name][-1][slot] for name in asked)


def counts_at(earlier: list[Counter[tuple[int, ...]]], tokens: list[int]) -> Counter[tuple[int, ...]]:
    """The counts of the first moment at which a domain had more than eight ninths of its tokens."""
    return next(counts for counts, seen in zip(earlier, tokens, strict=True) if seen * 9 >= tokens[-1] * 8)


def random_batch(seed: int, *, sequences: int = 32, length: int = 64, tokens: int = 3000) -> PackedSequences:
    generator = torch.Generator().manual_seed(seed)
    return PackedSequences.pack(torch.randint(tokens, (sequences, length), generator=generator).tolist())


def no_hits(batch: PackedSequences) -> torch.Tensor:
    return torch.zeros(batch.num_tokens, dtype=torch.bool)


def true_counts(batches: list[PackedSequences], window: int) -> Counter[tuple[int, ...]]:
    counted: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        for ids in batch.input_ids.split(batch.lengths):
            counted.update(window_keys(ids.tolist(), window))
    return counted


def test_a_domain_grows_within_its_quarter_of_the_memory_and_says_what_it_lost() -> None:
    recorder = TrafficRecorder(2, max_bytes="16MiB", clock=Clock())
    batches = [random_batch(seed) for seed in range(160)]
    for batch in batches:
        recorder.record(batch, ["a"] * batch.num_sequences, no_hits(batch))
        assert recorder.memory_bytes <= 4 << 20
    assert recorder.memory_bytes > 2 << 20
    counts, true = recorder.drain("a"), true_counts(batches, 2)
    assert counts.occurrences == true.total()
    found = as_counter(counts)
    assert counts.max_error > 0
    for key, count in true.items():
        assert found.get(key, 0) <= count <= found.get(key, 0) + counts.max_error


def test_memory_is_bounded_however_many_domains_there_are() -> None:
    spilled: list[tuple[str, TrafficCounts]] = []
    recorder = TrafficRecorder(
        3, max_bytes=4 * LEAST_BYTES, clock=Clock(), spill=lambda *item: spilled.append(item)
    )
    domains = [f"domain{number}" for number in range(40)]
    for number, domain in enumerate(domains):
        batch = random_batch(number, sequences=8)
        recorder.record(batch, [domain] * 8, ~no_hits(batch))
        assert recorder.memory_bytes <= recorder.max_bytes
    assert 0 < len(spilled) < len(domains)
    assert [name for name, _ in spilled] == domains[: len(spilled)]  # longest ago goes first
    everything = dict(spilled) | {domain: recorder.drain(domain) for domain in recorder.domains}
    assert everything.keys() == set(domains)
    for number, domain in enumerate(domains):
        counts, true = everything[domain], true_counts([random_batch(number, sequences=8)], 3)
        assert (counts.tokens, counts.windows, counts.hits) == (8 * 64, 8 * 64, 8 * 64)
        found = as_counter(counts)
        assert all(found.get(key, 0) <= n <= found.get(key, 0) + counts.max_error for key, n in true.items())


def test_without_spill_a_domain_that_gave_up_its_memory_keeps_its_totals() -> None:
    recorder = TrafficRecorder(2, max_bytes=LEAST_BYTES, clock=Clock())
    for number in range(12):
        batch = random_batch(number, sequences=4)
        recorder.record(batch, [f"domain{number}"] * 4, no_hits(batch))
    assert recorder.memory_bytes <= LEAST_BYTES
    oldest, newest = recorder.drain("domain0"), recorder.drain("domain11")
    assert (oldest.tokens, oldest.windows, len(oldest.keys)) == (256, 252, 0)
    assert (newest.tokens, newest.windows) == (256, 252)
    assert as_counter(newest) == true_counts([random_batch(11, sequences=4)], 2)


def test_counting_keeps_to_its_share_of_time_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    seconds_per_sequence = 1e-4
    add = FrequencySketch.add_windows

    def slow(sketch, ids, offsets, numbers, **options):
        clock.now += seconds_per_sequence * len(numbers)
        add(sketch, ids, offsets, numbers, **options)

    monkeypatch.setattr(FrequencySketch, "add_windows", slow)
    recorder = TrafficRecorder(2, max_share=0.02, clock=clock)
    batch = random_batch(0)
    domains, hits = ["a"] * batch.num_sequences, no_hits(batch)

    def serve(batches: int, idle_seconds: float) -> float:
        started, spent = clock.now, recorder.share_of_time * clock.now
        for _ in range(batches):
            recorder.record(batch, domains, hits)
            clock.now += idle_seconds
        return (recorder.share_of_time * clock.now - spent) / (clock.now - started)

    assert serve(100, idle_seconds=1.0) < 0.02  # 3.2 ms of counting a second
    assert recorder.probability == 1
    serve(300, idle_seconds=0.01)  # all of it would take a quarter of the time
    assert serve(3000, idle_seconds=0.01) < 0.02
    assert 1 / 64 <= recorder.probability <= 1 / 8
    serve(100, idle_seconds=1.0)
    assert recorder.probability == 1
    assert recorder.drain("a").tokens == 3500 * batch.num_tokens


def test_sampled_counts_are_unbiased_and_repeat_by_seed() -> None:
    def sampled(seed: int) -> dict[tuple[int, ...], float]:
        clock = Clock()
        recorder = TrafficRecorder(2, max_share=0.01, seed=seed, clock=clock)
        clock.now = 10.0
        recorder._throttle.spend(9.7, 10.0)  # three times its share
        assert recorder.probability == 1 / 4
        for batch in batches:
            recorder.record(batch, ["a"] * batch.num_sequences, no_hits(batch))
        return as_counter(recorder.drain("a"))

    batches = [random_batch(seed, sequences=100, length=2, tokens=3) for seed in range(50)]
    true = true_counts(batches, 2)
    found = sampled(0)
    for key, count in true.items():
        # A sequence is one bigram here: binomial with n = count and p = 1/4, times 4.
        assert abs(found[key] - count) < 6 * 4 * (count * 3 / 16) ** 0.5
        assert found[key] % 4 == 0
    assert found == sampled(0) != sampled(1)


def test_threads_that_record_and_drain_lose_nothing() -> None:
    recorder = TrafficRecorder(2, clock=Clock())
    batches = [random_batch(seed, sequences=8, tokens=50) for seed in range(60)]
    drained: list[TrafficCounts] = []

    def serve(batch: PackedSequences) -> None:
        recorder.record(batch, ["a"] * batch.num_sequences, no_hits(batch))
        if batch is batches[20] or batch is batches[40]:
            drained.append(recorder.drain("a"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, batches))
    drained.append(recorder.drain("a"))
    total: Counter[tuple[int, ...]] = Counter()
    for counts in drained:
        total.update(as_counter(counts))
    assert total == true_counts(batches, 2)
    assert sum(counts.tokens for counts in drained) == sum(batch.num_tokens for batch in batches)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="256 KiB"):
        TrafficRecorder(2, max_bytes=1000)
    with pytest.raises(InvalidSizeError):
        TrafficRecorder(2, max_bytes="much")
    with pytest.raises(ValueError, match="window"):
        TrafficRecorder(4)
    with pytest.raises(ValueError, match="max_share"):
        TrafficRecorder(2, max_share=0)
