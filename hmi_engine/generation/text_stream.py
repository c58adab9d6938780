"""From token ids to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

__all__ = ["TextStream"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one request.

    A token can end inside a character, and a stop string inside a token or several tokens on; so text is
    given out only when no later token can change it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        """Nothing has come yet."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._open: list[int] = []  # tokens since the text last ended with a whole character
        self._before: list[int] = []  # those before them: how a token is decoded may depend on its neighbour
        self._text = ""  # decoded so far
        self._closed = 0  # characters of it that are not of open tokens
        self._given = 0  # characters of it that were given out
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All that was decoded, up to the stop string if there was one."""
        return self._text

    def add(self, *token_ids: int) -> str:
        """Takes the next token, or several; returns the text that is certain now, maybe none."""
        self._open += token_ids
        decoded = self._decode_open()
        # However many bytes of a character have come, they are one sign until the last one comes.
        certain = decoded.removesuffix(_BROKEN)
        self._extend(certain)
        if certain and certain == decoded:
            self._before, self._open = self._open, []
            self._closed = len(self._text)
        return self._give(len(self._text) if self.is_stopped else len(self._text) - self._held_back())

    def finish(self) -> str:
        """The text that was held back, and what a last token left open; call it once, at the end."""
        if not self.is_stopped:
            self._extend(self._decode_open())
        return self._give(len(self._text))

    def _decode_open(self) -> str:
        before: str = self._tokenizer.decode(self._before, skip_special_tokens=True)
        both: str = self._tokenizer.decode(self._before + self._open, skip_special_tokens=True)
        return both[len(before) :]

    def _extend(self, of_open: str) -> None:
        before = len(self._text)
        self._text = self._text[: self._closed] + of_open
        self._look_for_stop(before)

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _look_for_stop(self, before: int) -> None:
        """Cuts the text before the stop string that is complete first; the longest of several at once."""
        found = []
        for stop in self._stop:
            start = self._text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if found:
            self._text = self._text[: min(found)[1]]
            self.is_stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        most = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), most, -1):
                if self._text.endswith(stop[:length]):
                    most = length
                    break
        return most
