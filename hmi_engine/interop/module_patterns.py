"""The regular expressions in PEFT's settings, matched as PEFT does, but never for longer than a moment.

A pattern comes from whoever made the folder. Python's matcher tries every way in which quantifiers can share
the text between them and every combination of alternatives, which a pattern such as ``(a+)+`` or
``(a|a)(a|a)(a|a)...`` lets grow without bound. So the number of ways is bounded before a pattern is used, and
that of patterns which are tried one after the other as if they were alternatives of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NoReturn

from hmi_engine.errors import InvalidAdapterError

__all__ = ["compile_pattern", "compile_patterns", "matches_end", "matches_whole"]

MAX_PATTERN_LENGTH = 2000
MAX_WAYS = 100_000
_LENGTH_OF_NAME = 60
"""What one quantifier can be: any part of a module's name."""


def matches_end(pattern: re.Pattern[str], module: str) -> bool:
    """PEFT's rule of ``rank_pattern``: the compiled pattern is the whole name, or its end after a dot."""
    if pattern.match(module):
        return True
    dots = (index for index, letter in enumerate(module) if letter == ".")
    return any(pattern.match(module, dot + 1) for dot in dots)


def matches_whole(pattern: str, module: str) -> bool:
    """PEFT's rule of a ``target_modules`` that is a text."""
    return compile_pattern(pattern).match(module) is not None


@lru_cache(maxsize=16)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The pattern, matched up to the end of the name; a few are kept, as each is asked for every module.

    Raises:
        InvalidAdapterError: no regular expression, or one that could run for too long.
    """
    (compiled,) = compile_patterns([pattern])
    return compiled


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """Patterns that are tried one after the other, each as :func:`compile_pattern` gives it.

    Raises:
        InvalidAdapterError: one is no regular expression, or all together could run for too long.
    """
    compiled, ways = [], 0
    for pattern in patterns:
        ways += _count_ways(pattern)
        if ways > MAX_WAYS:
            _refuse(pattern, "can match in very many ways, it alone or with those before it,")
        try:
            compiled.append(re.compile(rf"(?:{pattern})$"))
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidAdapterError(f"{pattern!r:.80} is no regular expression: {error!s:.80}") from error
    return compiled


def _count_ways(pattern: str) -> int:
    if len(pattern) > MAX_PATTERN_LENGTH:
        _refuse(pattern, f"has {len(pattern)} letters")
    ways, alternatives, index, before = 1, [1], 0, ""
    while index < len(pattern):
        letter = pattern[index]
        if letter in "*+{":
            ways *= _LENGTH_OF_NAME
            if before == ")":
                _refuse(pattern, "repeats a group")
        elif letter == "?":
            ways *= 2
        elif letter == "|":
            alternatives[-1] += 1
        elif letter == "(":
            alternatives.append(1)
            index += _group_start(pattern, index)
        elif letter == ")":
            ways *= alternatives.pop() if len(alternatives) > 1 else 1
        elif letter == "\\" and pattern[index + 1 : index + 2].isdigit():
            _refuse(pattern, "refers to a group")
        before = letter
        index = _next(pattern, index)
    for count in alternatives:
        ways *= count
    return ways


def _group_start(pattern: str, index: int) -> int:
    """How many letters of ``(?:`` follow its bracket; no other group with a question mark is taken."""
    if pattern.startswith("(?", index) and not pattern.startswith("(?:", index):
        _refuse(pattern, "uses (?...)")
    return 2 if pattern.startswith("(?:", index) else 0


def _next(pattern: str, index: int) -> int:
    """The index behind a letter, an escaped letter or ``[...]`` (where a first ``]`` is a letter)."""
    if pattern[index] == "\\":
        return index + 2
    if pattern[index] != "[":
        return index + 1
    index += 2 if pattern.startswith("[^", index) else 1
    first = index
    while index < len(pattern) and (pattern[index] != "]" or index == first):
        index += 2 if pattern[index] == "\\" else 1
    return index + 1


def _refuse(pattern: str, reason: str) -> NoReturn:
    raise InvalidAdapterError(
        f"the pattern {pattern!r:.80} {reason} and could take for ever to match; list the modules' names "
        "instead, or use a plainer pattern"
    )
