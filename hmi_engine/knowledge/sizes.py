"""Byte sizes as people write them."""

import re

from hmi_engine.errors import InvalidSizeError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_MAX_BYTES = 2**63 - 1


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes from an int or from text such as ``"256MiB"``, ``"1.5 GB"`` or ``"4096"``.

    kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB, and the letters K, M, G, T alone, powers of 1024.
    Case is ignored. Raises :class:`InvalidSizeError` for anything else, for a negative size and for one above
    2**63 - 1 bytes.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InvalidSizeError(
            f"a size is an int or text such as '256MiB', not {type(size).__name__}: {size!r:.80}"
        )
    number = size if isinstance(size, int) else _parse_text(size)
    if not 0 <= number <= _MAX_BYTES:
        raise InvalidSizeError(f"size {size!r:.80} is out of range: 0 to 2**63 - 1 bytes")
    return number


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidSizeError(
            f"size {text!r:.80} is not understood: write a number and a unit, such as '256MiB' or '1.5GB'"
        )
    # Whole numbers stay exact above 2**53.
    return int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)


def format_bytes(size: int) -> str:
    """Return ``size`` bytes as short text in powers of 1024, such as ``"256.0 MiB"``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
