"""Texts of a busy loop with a tiny cache are those that each request gives alone."""

import collections
import random

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from loop_world import END, World, head_output_of, next_token_of

from hmi_engine.errors import EngineFaultError, OverloadedError, UnknownTenantError
from hmi_engine.generation.sequence import FinishReason
from hmi_engine.generation.token_choice import TokenChooser
from hmi_engine.sampling import Sampling


def generated_alone(tokenizer, sequence):
    """Tokens, text and reason by one request after the other, with nothing but the model and the rules."""
    sampling = sequence.sampling
    token_ids = list(sequence.request.input_ids)
    chooser = TokenChooser(sampling)
    generated = []
    while True:
        token = chooser.choose(next_token_of(sequence.tenant.weights, token_ids), token_ids).token_id
        token_ids.append(token)
        generated.append(token)
        text = tokenizer.decode(generated)
        found = [text.find(stop) for stop in sampling.stop if stop in text]
        if found:
            return generated, text[: min(found)], FinishReason.STOP
        if token == END and not sampling.ignore_end:
            return generated, text, FinishReason.STOP
        if len(generated) == sampling.max_tokens or len(token_ids) == sequence.most_tokens:
            return generated, text, FinishReason.LENGTH


def check_result(world, sequence):
    """A sequence that was neither cancelled nor failed gave what it gives alone."""
    result = world.results[sequence]
    if not sequence.is_generating:
        expected = head_output_of(sequence.tenant.weights, sequence.request.input_ids)
        assert torch.equal(result.values, expected.values)
        assert world.emitted[sequence] == []
        return
    generated, text, reason = generated_alone(world.tokenizer, sequence)
    assert (sequence.generated, sequence.text.text, result) == (generated, text, reason)
    pieces = world.emitted[sequence]
    assert [piece.token_id for piece in pieces] == generated
    assert "".join(piece.text for piece in pieces) == text


def check_beginning(world, sequence):
    """One that was cut short has the beginning of it."""
    if sequence.is_generating:
        generated, text, _ = generated_alone(world.tokenizer, sequence)
        assert generated[: len(sequence.generated)] == sequence.generated
        assert text.startswith("".join(piece.text for piece in world.emitted[sequence]))


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.sampled_from([1, 8, 11, 14]),
    stop=st.lists(st.sampled_from(["b", "aa"]), max_size=1).map(tuple),
    ignore_end=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
) | st.builds(
    Sampling, max_tokens=st.sampled_from([1, 8, 11, 14]), temperature=st.just(1.0), seed=st.integers(0, 5)
)

ARRIVALS = st.lists(
    st.fixed_dictionaries(
        {
            "step": st.integers(0, 4),
            "tenant": st.sampled_from(["a1", "a2", "b", "c-head", "a-head"]),
            # Prompts that begin alike, so that blocks are found.
            "prompt": st.tuples(st.integers(0, 9), st.lists(st.integers(1, 3), max_size=2)),
            "sampling": SAMPLINGS,
            "most_tokens": st.integers(16, 20),
            "fails_at": st.sampled_from([10**6] * 5 + [3, 9]),
            "cancelled_at": st.sampled_from([None] * 5 + [0, 1, 3, 8, 13]),
        }
    ),
    min_size=5,
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(
    arrivals=ARRIVALS,
    cache_tokens=st.sampled_from([10, 20, 21, 24, 28, 60]),
    block_size=st.integers(1, 5),
    max_running=st.sampled_from([1, 3, 5, 7, 9]),
    extra_tokens=st.sampled_from([0, 1, 3, 50]),
    failing_steps=st.sets(st.integers(1, 12), max_size=1) | st.just(set()),
    most_tenants=st.sampled_from([1, 2, 100]),
)
def test_texts_are_those_of_requests_alone(
    byte_tokenizer, arrivals, cache_tokens, block_size, max_running, extra_tokens, failing_steps, most_tenants
):
    num_blocks = cache_tokens // block_size
    world = World(
        byte_tokenizer,
        num_blocks=num_blocks,
        block_size=block_size,
        max_step_tokens=max_running + extra_tokens,
        max_running=max_running,
        most_tenants=most_tenants,
    )
    world.runner.failing_steps = failing_steps
    cancelled_at = collections.defaultdict(list)
    coming = collections.defaultdict(list)
    for arrival in arrivals:
        length, tail = arrival["prompt"]
        sequence = world.sequence(
            arrival["tenant"],
            [7, 8, 9, 7, 8, 9, 7, 8, 9][:length] + tail or [7],
            arrival["sampling"],
            most_tokens=arrival["most_tokens"],
            fails_at=arrival["fails_at"],
        )
        coming[arrival["step"]].append(sequence)
        cancelled_at[arrival["cancelled_at"]].append(sequence)
    for step in range(14):
        for sequence in coming[step]:
            try:
                world.add(sequence)
            except OverloadedError:
                assert needed_tokens(sequence) > num_blocks * block_size
            else:
                assert needed_tokens(sequence) <= num_blocks * block_size
        for sequence in cancelled_at[step]:
            sequence.is_cancelled = sequence not in world.results
        world.step()
        assert not any(sequence.is_cancelled for sequence in world.alive)
    world.run()
    assert set(world.results) == set(world.begun)
    check_all(world)
    if world.loop.statistics.preemptions:
        event("preempted")
    if world.loop.statistics.reused_tokens:
        event("reused")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_crowd_in_a_cache_for_two(byte_tokenizer, seed):
    generator = random.Random(seed)
    block_size = generator.randint(1, 4)
    max_running = generator.choice([4, 8])
    world = World(
        byte_tokenizer,
        num_blocks=24 // block_size,
        block_size=block_size,
        max_step_tokens=max_running + generator.choice([0, 1, 5, 30]),
        max_running=max_running,
    )
    for number in range(10):
        is_drawn = generator.random() < 0.5
        sampling = Sampling(
            max_tokens=12, ignore_end=True, temperature=float(is_drawn), seed=number if is_drawn else None
        )
        prompt = [7, *[8, 9, 7, 8, 9, 7][: generator.randint(0, 6)], generator.randint(1, 3)]
        world.add(world.sequence(generator.choice(["a1", "a2", "b"]), prompt, sampling))
        for _ in range(generator.choice([0, 0, 1, 3])):
            world.step()
        if world.alive and generator.random() < 0.1:
            generator.choice(world.alive).is_cancelled = True
    world.run()
    assert world.loop.statistics.preemptions > 0
    assert set(world.results) == set(world.begun)
    check_all(world)


def needed_tokens(sequence):
    most = len(sequence.request.input_ids) + sequence.is_generating * sequence.sampling.max_tokens
    return min(most, sequence.most_tokens)


def check_all(world):
    for sequence, result in world.results.items():
        if isinstance(result, UnknownTenantError):
            assert sequence.request.id["fails_at"] < 10**6
            check_beginning(world, sequence)
        elif isinstance(result, EngineFaultError):
            assert world.runner.failing_steps and "'compute'" in str(result)
            check_beginning(world, sequence)
        elif sequence.is_cancelled:
            assert result is FinishReason.STOP
            check_beginning(world, sequence)
        else:
            check_result(world, sequence)
    first_steps = [world.runner.first_steps[each] for each in world.begun if each in world.runner.first_steps]
    assert first_steps == sorted(first_steps), "they begin in the order in which they came"


def test_a_full_cache_preempts_and_changes_no_text(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=6)
    for number in range(5):
        world.add(world.sequence("a", [7, 8, 10 + number], Sampling(max_tokens=9, ignore_end=True)))
    world.run()
    assert world.loop.statistics.preemptions > 0
    check_all(world)
    assert world.loop.statistics.generated_tokens == 5 * 9


def test_what_a_preempted_sequence_finds_of_itself_is_not_reused(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=10)
    for start in (10, 20):
        prompt = list(range(start, start + 4))
        world.add(world.sequence("a", prompt, Sampling(max_tokens=10, ignore_end=True)))
    world.run()
    _, second = world.begun
    statistics = world.loop.statistics
    assert statistics.preemptions > 0
    assert world.runner.num_computed[second] < 13 + 10, "of the ten that it gave up it found some again"
    assert (statistics.reused_tokens, second.num_reused) == (0, 0)
    check_all(world)


def test_a_large_cache_preempts_nothing_and_a_second_prompt_is_found(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=100)
    prompt = [7, 8, 9, 10, 11, 12]
    for _ in range(2):
        for tenant in ("a1", "a2", "b"):
            world.add(world.sequence(tenant, prompt, Sampling(max_tokens=3, ignore_end=True)))
        world.run()
    statistics = world.loop.statistics
    assert statistics.preemptions == 0
    # At least the last token is computed; a1 and a2 have the same weights, and b others.
    last = world.begun[-3:]
    assert [sequence.num_reused for sequence in last] == [4, 4, 4]
    assert statistics.prompt_tokens + statistics.reused_tokens == 6 * len(prompt)
    check_all(world)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "most_tokens", "fits"),
    [(8, 4, 100, True), (8, 5, 100, False), (1, 12, 100, False), (1, 10**9, 12, True), (13, 1, 12, True)],
)
def test_what_cannot_fit_alone_is_refused(byte_tokenizer, prompt, max_tokens, most_tokens, fits):
    world = World(byte_tokenizer, num_blocks=6)
    sequence = world.sequence("a", [7] * prompt, Sampling(max_tokens=max_tokens), most_tokens=most_tokens)
    if fits:
        world.loop.check_fits(sequence)
    else:
        with pytest.raises(OverloadedError, match="needs 7 blocks of 2 tokens, but the cache has 6"):
            world.loop.check_fits(sequence)


def test_a_head_needs_no_room_for_a_text(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=6)
    world.add(world.sequence("a-head", [7] * 12, Sampling(max_tokens=100)))
    world.run()
    check_all(world)


def test_a_long_prompt_holds_up_no_text(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=40, max_step_tokens=4)
    text = world.sequence("a", [7], Sampling(max_tokens=8, ignore_end=True))
    prompt = world.sequence("b", [9] * 20, Sampling(max_tokens=2, ignore_end=True))
    world.add(text)
    world.step()
    world.add(prompt)
    for count in range(2, 9):
        assert text in world.alive
        world.step()
        assert len(text.generated) == count
    assert len(prompt.generated) == 1, "3 tokens a step beside the text"
    world.run()
    check_all(world)


def test_one_cancelled_by_the_end_of_another_ends_too(byte_tokenizer):
    world = World(byte_tokenizer, max_running=1)
    for _ in range(4):
        world.add(world.sequence("a", [7, 8], Sampling(max_tokens=5, ignore_end=True)))
    _, second, third, fourth = world.begun
    world.step()
    second.is_cancelled = True
    world.on_finish = lambda _: setattr(third, "is_cancelled", True)
    world.run()
    assert set(world.results) == set(world.begun)
    assert not third.generated and len(fourth.generated) == 5


def test_abandoned_sequences_hold_nothing(byte_tokenizer):
    world = World(byte_tokenizer, max_running=2)
    for _ in range(3):
        world.add(world.sequence("a", [7, 8], Sampling(max_tokens=5, ignore_end=True)))
    world.step()
    assert world.loop.abandon() == world.begun
    assert world.pool.num_held == 0 and len(world.loop) == 0 and world.runner.is_resting
    assert not world.loop.step() and not world.results


def test_who_has_no_room_for_its_adapter_waits_in_turn(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=100, most_tenants=2)
    for tenant in ("a", "b", "a", "c", "a"):
        world.add(world.sequence(tenant, [7, 8], Sampling(max_tokens=4, ignore_end=True)))
    *first_three, third_tenant, last = world.begun
    world.run()
    steps = world.runner.first_steps
    assert [steps[sequence] for sequence in first_three] == [1, 1, 1]
    # The last one would have had room at once, but may not pass by who came before it.
    assert 1 < steps[third_tenant] <= steps[last]
    check_all(world)


@pytest.mark.parametrize(
    ("room", "begun", "waiting"),
    [
        ({}, 3, 0),  # 3, 3 and 2 of 3 tokens
        ({"max_running": 2}, 2, 0),
        ({"num_blocks": 4}, 2, 1),  # of two tokens each
        ({"max_step_tokens": 100, "max_running": 100}, 6, 0),
        ({"most_tenants": 2}, 2, 1),
    ],
)
def test_a_step_asks_for_as_many_as_it_can_begin(byte_tokenizer, room, begun, waiting):
    world = World(byte_tokenizer, **{"num_blocks": 100, **room})
    for number in range(6):
        sampling = Sampling(max_tokens=5, ignore_end=True)
        world.coming.append(world.sequence(f"a{number}", [7, 8, number], sampling))
    world.step()
    statistics = world.loop.statistics
    assert (statistics.running, statistics.waiting) == (begun, waiting)
    assert len(world.coming) == 6 - begun - waiting
    world.run()
    assert len(world.results) == 6
    check_all(world)


def test_nobody_is_asked_for_while_one_waits(byte_tokenizer):
    world = World(byte_tokenizer, num_blocks=100, most_tenants=1)
    for tenant in ("a", "b", "a", "a"):
        world.coming.append(world.sequence(tenant, [7], Sampling(max_tokens=3, ignore_end=True)))
    for _ in range(3):
        world.step()
        assert len(world.coming) == 2
    world.run()
    check_all(world)
