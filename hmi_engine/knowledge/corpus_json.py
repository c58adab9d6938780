"""The objects of a file of JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmi_engine.knowledge.corpus_lines import numbered_lines
from hmi_engine.knowledge.corpus_report import Reading

__all__ = ["json_objects", "text_fault"]


def json_objects(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbers and objects of the lines; what is no object is refused."""
    for number, line in numbered_lines(path, reading):
        found = _parse_object(line)
        if isinstance(found, str):
            reading.refuse(path, number, found)
        else:
            yield number, found


def _parse_object(line: str) -> dict[str, Any] | str:
    """Return a line's JSON object, or, as text, why there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return found if isinstance(found, dict) else f"a JSON {type(found).__name__}, expected an object"


def text_fault(found: dict[str, Any], field: str) -> str | None:
    """Say why a field holds no text, None where it does."""
    text = found.get(field)
    if not isinstance(text, str):
        return f"no string in field {field!r}; the fields are {sorted(found)!r:.200}"
    return None if text.strip() else f"field {field!r} is blank"
