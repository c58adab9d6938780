"""How fast requests are served, as measured."""

from __future__ import annotations

__all__ = ["ServingRate"]

HALF_LIFE_SECONDS = 10.0


class ServingRate:
    """Tokens served per second of work; pauses in which nothing runs do not count.

    Older measurements weigh half after each ``half_life`` seconds of work. Not thread-safe.
    """

    def __init__(self, half_life: float = HALF_LIFE_SECONDS) -> None:
        """Nothing is measured."""
        self._half_life = half_life
        self._tokens = 0.0
        self._seconds = 0.0
        self._since: float | None = None  # up to when work was counted; None while nothing runs

    @property
    def tokens_per_second(self) -> float | None:
        """None before anything was served."""
        return self._tokens / self._seconds if self._tokens > 0 and self._seconds > 0 else None

    def begin(self, now: float) -> None:
        """A batch was formed."""
        if self._since is None:
            self._since = now

    def end(self, num_tokens: int, now: float, *, still_running: bool) -> None:
        """So many tokens were served by ``now``."""
        elapsed = 0.0 if self._since is None else max(0.0, now - self._since)
        kept = 0.5 ** (elapsed / self._half_life)
        self._tokens = self._tokens * kept + num_tokens
        self._seconds = self._seconds * kept + elapsed
        self._since = now if still_running else None
