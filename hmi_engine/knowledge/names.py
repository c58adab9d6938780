"""The form of tenant and domain names."""

import re

from hmi_engine.errors import InvalidNameError

__all__ = ["check_name"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME = re.compile(rf"{_PART}(/{_PART})?")
_RULE = (
    "a name is one or two parts joined by '/', each of 1 to 64 letters, digits, '.', '_' or '-', "
    "beginning with a letter or digit"
)


def check_name(name: object, what: str = "tenant") -> str:
    """Return ``name`` if it is a valid tenant or domain name, else raise :class:`InvalidNameError`.

    ``what`` is the word for the thing in the message. The error states the rule and, where there is one
    obvious correction, suggests it.
    """
    if not isinstance(name, str):
        raise InvalidNameError(f"{what} name must be a str, not {type(name).__name__}: {name!r:.80}")
    if _NAME.fullmatch(name):
        return name
    suggestion = _corrected(name)
    hint = f"; did you mean {suggestion!r}?" if suggestion else ""
    raise InvalidNameError(f"{what} name {name!r:.200} is not allowed: {_RULE}{hint}")


def _corrected(name: str) -> str | None:
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", part.strip()) for part in re.split(r"[/\\]+", name)]
    parts = [
        part for part in (re.sub(r"^[^A-Za-z0-9]+", "", part).rstrip("-")[:64] for part in parts) if part
    ]
    candidate = "/".join(parts)
    return candidate if _NAME.fullmatch(candidate) else None
