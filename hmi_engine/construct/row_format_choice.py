"""In which format a new table's rows lie, where nobody asked for one.

Where bytes are short, more rows are worth more than exact ones: on labelled sets, rows of ``pq8`` cost 0.2
+- 0.5 points of accuracy against the same rows as float16, and the rows that 4 MiB then hold besides gained
3.8 +- 1.6 (docs/coverage.md, benchmarks/compression.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hmi_engine.construct.row_encoding import is_available
from hmi_engine.errors import BudgetTooSmallError, UnsupportedModelError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.row_formats import RowFormat
from hmi_engine.knowledge.selection import Selection

__all__ = ["DENSE_FORMAT", "ChosenRows", "choose_row_format"]

DENSE_FORMAT: RowFormat = "pq8"
"""Eight times smaller than float16, but for its codebooks, which a table has whatever its rows."""


class ChosenRows(NamedTuple):
    """A table's rows, the format they lie in, and in words why it is this one."""

    row_format: RowFormat
    rows: Selection
    reason: str


def choose_row_format(general: GeneralInfo, select: Callable[[RowFormat], Selection]) -> ChosenRows:
    """Chooses floats, or :data:`DENSE_FORMAT` where its rows within the budget are found more often.

    Args:
        general: the store's base, whose ``row_dtype`` the floats have.
        select: gives the rows that the budget holds in a format, and raises where it cannot be used.

    Raises:
        BudgetTooSmallError: the budget does not hold one row.
    """
    floats: RowFormat = general.row_dtype
    as_floats = select(floats)
    try:
        as_codes = select(DENSE_FORMAT)
    except (BudgetTooSmallError, UnsupportedModelError) as error:
        return ChosenRows(floats, as_floats, f"{DENSE_FORMAT} cannot be had: {error}")
    if as_codes.hit_mass <= as_floats.hit_mass:
        return ChosenRows(floats, as_floats, f"{DENSE_FORMAT} would hold no more of what the text asks for")
    difference = f"{as_codes.hit_mass:.1%} of the text's n-grams instead of {as_floats.hit_mass:.1%}"
    if not is_available(DENSE_FORMAT):
        return ChosenRows(
            floats, as_floats, f"{DENSE_FORMAT} would hold {difference}, but faiss cannot be imported here"
        )
    return ChosenRows(DENSE_FORMAT, as_codes, f"it holds {difference} as {floats}")
