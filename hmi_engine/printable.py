"""Text of files and of libraries that quote them, made safe to show."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    r"""The text with whatever a terminal would obey written out, such as ``\x1b``; line ends stay.

    Whoever sends a file would otherwise decide what stands on the screen of the one who reads the error.
    """
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in text
    )
