"""Settings that cannot be meant are refused, by a message that names the setting and what was found."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmi_engine.errors import InvalidRequestError
from hmi_engine.request import Request
from hmi_engine.sampling import Sampling

BAD_VALUES = [
    ("max_tokens", 0, "integer of at least 1, found 0"),
    ("max_tokens", -3, "found -3"),
    ("max_tokens", 2.0, "found 2.0"),
    ("max_tokens", True, "found True"),
    ("max_tokens", "8", "found '8'"),
    ("max_tokens", None, "found None"),
    ("temperature", -0.1, "at least 0, found -0.1"),
    ("temperature", float("nan"), "found nan"),
    ("temperature", float("inf"), "found inf"),
    ("temperature", 10**400, "found 1000"),
    ("temperature", "hot", "found 'hot'"),
    ("temperature", False, "found False"),
    ("temperature", None, "found None"),
    ("top_k", 0, "integer of at least 1, found 0"),
    ("top_k", 1.5, "found 1.5"),
    ("top_k", [5], r"found \[5\]"),
    ("top_p", 0, "above 0"),
    ("top_p", 1.01, "0 to 1, found 1.01"),
    ("top_p", -0.5, "found -0.5"),
    ("top_p", float("nan"), "found nan"),
    ("top_p", None, "found None"),
    ("repetition_penalty", 0.0, "0.01 to 100"),
    ("repetition_penalty", -1, "0.01 to 100, found -1"),
    ("repetition_penalty", float("inf"), "found inf"),
    ("repetition_penalty", -(10**400), "found -1000"),
    ("repetition_penalty", "1", "found '1'"),
    ("seed", 1.0, "must be an integer, found 1.0"),
    ("seed", "x" * 1000, "found 'xxx"),
    ("seed", True, "found True"),
    ("stop", ["a"] * 17, "at most 16 strings"),
    ("stop", 5, "at most 16 strings"),
    ("stop", None, "at most 16 strings"),
    ("stop", {"a": 1}, "at most 16 strings"),
    ("stop", [""], "holds ''; each is a string of 1 to 256 characters"),
    ("stop", "", "holds ''"),
    ("stop", ["x" * 257], "1 to 256 characters"),
    ("stop", ["a", 5], "holds 5"),
    ("stop", [None], "holds None"),
    ("ignore_end", "no", "true or false, found 'no'"),
    ("ignore_end", 1, "found 1"),
    ("logprobs", None, "found None"),
    ("logprobs", 5, "found 5"),
]

CONTRADICTIONS = [{"top_k": 5}, {"top_p": 0.9}, {"seed": 0}, {"temperature": 0, "top_k": 5, "seed": 3}]

GOOD_SETTINGS = {
    "max_tokens": st.integers(1, 10**12),
    "top_k": st.none() | st.integers(1, 10**12),
    "top_p": st.floats(0, 1, exclude_min=True),
    "repetition_penalty": st.floats(0.01, 100) | st.integers(1, 5),
    "seed": st.none() | st.integers(),
    "stop": st.lists(st.text(min_size=1, max_size=5), max_size=4) | st.text(min_size=1, max_size=20),
    "ignore_end": st.booleans(),
    "logprobs": st.booleans(),
}


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES, ids=lambda value: repr(value)[:20])
def test_a_bad_value_is_refused_by_its_name(name, value, message):
    with pytest.raises(InvalidRequestError, match=rf"\b{name}\b.*{message}") as caught:
        Sampling.of({"temperature": 1.0, name: value}).check()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_settings_of_draws_are_refused_where_nothing_is_drawn(contradiction):
    with pytest.raises(InvalidRequestError, match=r"temperature 0 .*leave top_k, top_p and seed out"):
        Sampling.of(contradiction).check()
    Sampling.of({**contradiction, "temperature": 0.5}).check()


@pytest.mark.parametrize("given_settings", [None, [], "greedy", 5, ["temperature"]])
def test_only_an_object_is_read(given_settings):
    with pytest.raises(InvalidRequestError, match=f"an object, found {type(given_settings).__name__}"):
        Sampling.of(given_settings)


def test_an_unknown_name_is_refused_and_all_known_ones_told():
    with pytest.raises(InvalidRequestError, match=re.escape("no setting 'best_of'")) as caught:
        Sampling.of({"best_of": 3, "temperature": 1})
    for field in dataclasses.fields(Sampling):
        assert field.name in str(caught.value)


def test_a_request_checks_its_settings():
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        Request("a", "text", sampling=Sampling(max_tokens=0)).check()
    with pytest.raises(InvalidRequestError, match="must be a Sampling, found dict"):
        Request("a", "text", sampling={"max_tokens": 5}).check()


def test_the_default_is_greedy():
    Sampling().check()
    assert Sampling().is_greedy and Sampling.of({}) == Sampling()
    assert not Sampling(temperature=1e-9).is_greedy


TEMPERATURES = st.floats(0.01, 1e6) | st.integers(1, 5)


@settings(max_examples=50)
@given(st.fixed_dictionaries({"temperature": TEMPERATURES}, optional=GOOD_SETTINGS))
def test_good_settings_come_through_json_as_they_are(good):
    read = Sampling.of(json.loads(json.dumps(good)))
    read.check()
    for name, value in good.items():
        if name == "stop":
            assert read.stop == ((value,) if isinstance(value, str) else tuple(value))
        else:
            assert getattr(read, name) == value
    hash(read)  # requests are compared
