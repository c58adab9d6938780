"""The example of the page on scheduling runs, and serves what it submits."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "scheduling.md"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    assert names["answers"] == ["BINDS THE RECEPTOR", "INHIBITS THE KINASE"]
    assert names["scheduler"].statistics.totals.served == 2
