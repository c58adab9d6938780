"""How a text is generated: how much of it, which tokens are chosen, and where it ends."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from hmi_engine.errors import InvalidRequestError

__all__ = ["Sampling"]

_MOST_STOPS = 16
_LONGEST_STOP = 256


@dataclass(frozen=True)
class Sampling:
    """Settings of one request to a language model head; the default is greedy, 64 tokens.

    Attributes:
        max_tokens: most tokens to generate; fewer where the model's positions end before.
        temperature: divides the logits; 0 takes the likeliest token, and nothing is drawn.
        top_k: only the so many likeliest tokens; None for all.
        top_p: only the likeliest tokens whose probabilities together reach this; 1 for all.
        repetition_penalty: the logits of tokens that prompt or text have already are divided by this where
            they are positive and multiplied where not (Keskar et al. 2019, arXiv 1909.05858).
        seed: of what is drawn: equal seeds give equal texts, whatever else the engine does. None: another
            each time.
        stop: the text ends before the first of these strings.
        ignore_end: go on after the model's end-of-text tokens.
        logprobs: whether the response tells each token's log-probability, by the model's logits as they are.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logprobs: bool = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> Sampling:
        """From JSON.

        Raises:
            InvalidRequestError: it is no object of known names.
        """
        if not isinstance(given, dict):
            raise InvalidRequestError(f"sampling must be an object, found {type(given).__name__}")
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise InvalidRequestError(
                f"sampling has no setting {unknown[0]!r}; it has {', '.join(cls.__dataclass_fields__)}"
            )
        stop = given.get("stop", ())
        if isinstance(stop, str):
            stop = (stop,)
        return cls(**{**given, "stop": tuple(stop) if isinstance(stop, list) else stop})

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def check(self) -> None:
        """Checks the settings by themselves.

        Raises:
            InvalidRequestError: one is out of range, or they contradict each other.
        """
        _check_integer("max_tokens", self.max_tokens, least=1)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, least=1)
        if self.seed is not None:
            _check_integer("seed", self.seed, least=None)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_p == 0:
            raise InvalidRequestError("top_p must be above 0; 1 turns it off")
        if self.is_greedy and (self.top_k is not None or self.top_p < 1 or self.seed is not None):
            raise InvalidRequestError(
                "temperature 0 takes the likeliest token and draws nothing: leave top_k, top_p and seed out, "
                "or give a temperature above 0"
            )
        for name in ("ignore_end", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, found {getattr(self, name)!r:.80}")
        self._check_stop()

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or len(self.stop) > _MOST_STOPS:
            raise InvalidRequestError(
                f"stop must be a tuple (in JSON a string or a list) of at most {_MOST_STOPS} strings"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_STOP:
                raise InvalidRequestError(
                    f"stop holds {text!r:.80}; each is a string of 1 to {_LONGEST_STOP} characters"
                )


def _check_integer(name: str, value: object, *, least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        floor = "" if least is None else f" of at least {least}"
        raise InvalidRequestError(f"{name} must be an integer{floor}, found {value!r:.80}")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer can be too large for a float.
    if not is_number or not least <= value <= min(most, sys.float_info.max):  # type: ignore[operator]
        bounds = f"at least {least:g}" if math.isinf(most) else f"{least:g} to {most:g}"
        raise InvalidRequestError(f"{name} must be a number, {bounds}, found {value!r:.80}")
