import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.errors import HmiError, InvalidNameError, InvalidSizeError
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.sizes import format_bytes, parse_bytes

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})?"


@pytest.mark.parametrize("name", ["a", "acme/chemprot", "A.b-c_9", "0", "x" * 64, "x" * 64 + "/" + "y" * 64])
def test_valid_names_are_returned_as_they_are(name: str) -> None:
    assert check_name(name) == name


PATH_NAMES = [
    "../a",
    "a/..",
    "/etc/passwd",
    "C:\\x",
    "a\\b",
    "a//b",
    "a/./b",
    "tenant%2f..",
    ".hidden",
    "/",
    "/a",
]
ODD_NAMES = ["", "a/", "a/b/c", "-flag", "a b", "a\n", "a\0", "é", "x" * 65, "\u202ea"]


@pytest.mark.parametrize("name", [*PATH_NAMES, *ODD_NAMES])
def test_names_that_are_paths_or_odd_are_refused(name: str) -> None:
    with pytest.raises(InvalidNameError, match="one or two parts"):
        check_name(name)


@pytest.mark.parametrize("name", [None, 3, b"a", ["a"], True])
def test_names_of_other_types_are_refused(name: object) -> None:
    with pytest.raises(InvalidNameError, match="domain name must be a str"):
        check_name(name, "domain")


@given(st.one_of(st.text(), st.from_regex(NAME_PATTERN, fullmatch=True), st.text(string.printable)))
def test_exactly_the_names_of_the_pattern_are_allowed(name: str) -> None:
    if re.fullmatch(NAME_PATTERN, name):
        assert check_name(name) == name
        return
    with pytest.raises(InvalidNameError) as caught:
        check_name(name)
    suggestion = re.search(r"did you mean '(.*)'\?", str(caught.value))
    assert suggestion is None or check_name(suggestion[1])


@pytest.mark.parametrize(
    ("given_name", "suggested"), [("my model", "my-model"), ("acme\\x", "acme/x"), ("/a", "a")]
)
def test_an_obvious_correction_is_suggested(given_name: str, suggested: str) -> None:
    with pytest.raises(InvalidNameError, match=re.escape(f"did you mean {suggested!r}?")):
        check_name(given_name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MiB", 256 * 1024**2),
        ("1.5GB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("4096", 4096),
        ("0", 0),
        (" 12 B ", 12),
        ("3k", 3072),
        ("2TiB", 2 * 1024**4),
        ("9007199254740993", 9007199254740993),
        (17, 17),
        (0, 0),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "1..5GB",
        "1e9",
        "nan",
        "inf",
        "10 parsecs",
        "1 Mi B",
        -1,
        True,
        1.5,
        None,
        "9" * 400,
        2**63,
    ],
)
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(InvalidSizeError) as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert isinstance(caught.value, HmiError)


@given(st.integers(min_value=0, max_value=2**62))
def test_formatted_sizes_are_read_back_to_a_twentieth(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.05 * max(size, 1)
