"""Pieces make up the whole text; they hold whole characters only, and nothing of a stop string."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hmi_engine.generation.text_stream import TextStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
ALPHABET = "ab 😀😁é日本n\u0303\u200d👩"

# Texts as they are encoded, the same bytes one by one, broken ones, any tokens at all.
PARTS = st.lists(
    st.tuples(st.just("text"), st.text(ALPHABET, max_size=8))
    | st.tuples(st.just("bytes"), st.text(ALPHABET, max_size=8).map(str.encode))
    | st.tuples(st.just("bytes"), st.binary(max_size=4) | st.just(REPLACEMENT.encode()))
    | st.tuples(st.just("bytes"), st.sampled_from("😀日é\ufffd").map(lambda one: one.encode()[:-1]))
    | st.tuples(st.just("ids"), st.lists(st.integers(0, 346), max_size=6)),
    max_size=6,
)


def byte_ids(tokenizer, data):
    """One token for each byte."""
    names = bytes_to_unicode()
    return [tokenizer.token_to_id(names[byte]) for byte in data]


def as_ids(tokenizer, parts):
    token_ids = []
    for kind, part in parts:
        if kind == "text":
            token_ids += tokenizer.encode(part).ids
        else:
            token_ids += byte_ids(tokenizer, part) if kind == "bytes" else part
    return token_ids


def expected_end(whole, stops):
    """The text before the stop string that is complete first; the longest, if several are at once."""
    for end in range(len(whole) + 1):
        lengths = [len(stop) for stop in stops if whole[:end].endswith(stop)]
        if lengths:
            return whole[: end - max(lengths)]
    return None


def test_the_tokenizer_is_hostile(byte_tokenizer):
    assert byte_tokenizer.get_vocab_size() == 347
    decoded = [byte_tokenizer.decode([token_id]) for token_id in range(347)]
    assert any(text.strip(REPLACEMENT) and text.endswith(REPLACEMENT) for text in decoded)
    assert any(text.strip(REPLACEMENT) and text.startswith(REPLACEMENT) for text in decoded)
    assert byte_tokenizer.decode(byte_ids(byte_tokenizer, "😀 é".encode())) == "😀 é"
    assert byte_tokenizer.decode(byte_tokenizer.encode(ALPHABET).ids) == ALPHABET


@settings(max_examples=150, deadline=None)
@given(parts=PARTS)
def test_pieces_make_up_the_text(byte_tokenizer, parts):
    token_ids = as_ids(byte_tokenizer, parts)
    stream = TextStream(byte_tokenizer, ())
    given_out = ""
    for count, token_id in enumerate(token_ids, 1):
        given_out += stream.add(token_id)
        # Only the last character can still become another one; all before it is there at once.
        assert given_out == byte_tokenizer.decode(token_ids[:count]).removesuffix(REPLACEMENT)
        assert not stream.is_stopped
    given_out += stream.finish()
    assert given_out == stream.text == byte_tokenizer.decode(token_ids)


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted))
def test_several_tokens_at_once(byte_tokenizer, parts, cuts):
    token_ids = as_ids(byte_tokenizer, parts)
    stream = TextStream(byte_tokenizer, ())
    given_out = ""
    for start, end in pairwise([0, *cuts, len(token_ids)]):
        given_out += stream.add(*token_ids[start:end])
    given_out += stream.finish()
    assert given_out == stream.text == byte_tokenizer.decode(token_ids)


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, stops=st.lists(st.text("ab 😀é", min_size=1, max_size=4), min_size=1, max_size=4))
@example(parts=[("text", "ab 😀 stop😀b")], stops=["stop"])
def test_the_text_ends_before_the_first_stop_string(byte_tokenizer, parts, stops):
    check_stops(byte_tokenizer, as_ids(byte_tokenizer, parts), stops)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text("ab", max_size=5), max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_stop_strings_that_overlap(byte_tokenizer, texts, stops):
    check_stops(byte_tokenizer, as_ids(byte_tokenizer, [("text", text) for text in texts]), stops)


def test_stop_strings_that_overlap_in_one_token(byte_tokenizer):
    decoded = {byte_tokenizer.decode([token_id]): token_id for token_id in range(347)}
    words = [text for text in decoded if len(text) > 2 and set(text) == {"a", "b"}]
    assert words
    for text in words:
        for stops in ([text, text[1:-1]], [text[1:], text[:-1]], [text[1], text], [text[2:], text[1:]]):
            check_stops(byte_tokenizer, [decoded[text]], stops)
            check_stops(byte_tokenizer, as_ids(byte_tokenizer, [("bytes", text.encode())]), stops)


def check_stops(tokenizer, token_ids, stops):
    stream = TextStream(tokenizer, stops)
    expected = expected_end(tokenizer.decode(token_ids), stops)
    given_out = ""
    for count, token_id in enumerate(token_ids, 1):
        given_out += stream.add(token_id)
        decoded = tokenizer.decode(token_ids[:count])
        assert stream.is_stopped == any(stop in decoded for stop in stops)
        if stream.is_stopped:
            assert given_out == stream.text == expected
            break
        # All is given out but what may be the beginning of a stop string.
        certain = decoded.removesuffix(REPLACEMENT)
        assert certain.startswith(given_out)
        held = certain[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    given_out += stream.finish()
    assert given_out == stream.text == (tokenizer.decode(token_ids) if expected is None else expected)


def test_a_stop_string_is_seen_in_a_token_that_ends_inside_a_character(byte_tokenizer):
    decoded = {byte_tokenizer.decode([token_id]): token_id for token_id in range(347)}
    mixed = [text for text in decoded if text.endswith(REPLACEMENT) and text.strip(REPLACEMENT)]
    for text in mixed:
        stream = TextStream(byte_tokenizer, [text[-2]])
        before = text[: text.index(text[-2])]
        assert stream.add(decoded[text]) == before and stream.is_stopped
        assert stream.finish() == "" and stream.text == before


def test_a_stop_string_of_signs_for_broken_characters_is_seen_at_the_end(byte_tokenizer):
    stream = TextStream(byte_tokenizer, [REPLACEMENT])
    [first, *_] = byte_ids(byte_tokenizer, "é".encode())
    [letter] = byte_ids(byte_tokenizer, b"a")
    assert [stream.add(letter), stream.add(first), stream.finish()] == ["a", "", ""]
    assert stream.text == "a" and stream.is_stopped


def test_special_tokens_are_no_text(byte_tokenizer):
    end = byte_tokenizer.token_to_id("<|endoftext|>")
    first, second = byte_ids(byte_tokenizer, "é".encode())
    stream = TextStream(byte_tokenizer, ["<|endoftext|>"])
    assert [stream.add(one) for one in (end, first, end, second, end)] == ["", "", "", "é", ""]
    assert stream.finish() == "" and stream.text == "é" and not stream.is_stopped


@pytest.mark.parametrize("decoder", [None, decoders.Metaspace(), decoders.WordPiece(cleanup=False)])
@given(token_ids=st.lists(st.integers(0, 5)))
def test_tokens_that_are_decoded_by_what_is_before_them(decoder, token_ids):
    words = ["one", "two", "▁one", "▁two", "##s", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    stream = TextStream(tokenizer, ())
    pieces = [stream.add(token_id) for token_id in token_ids]
    assert "".join([*pieces, stream.finish()]) == stream.text == tokenizer.decode(token_ids)
