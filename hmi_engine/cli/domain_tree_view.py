"""The domain knowledge tree as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from hmi_engine.knowledge.records import DomainInfo
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.memory.coverage import Coverage

__all__ = ["describe_domain", "domain_tree"]


def describe_domain(info: DomainInfo) -> dict[str, Any]:
    """What programs are told of a domain: everything but the store's own numbers and paths."""
    return info.model_dump(mode="json", exclude={"id", "parent_id", "file", "previous", "layers"}) | {
        "own_layers": info.layers is not None,
        "previous_generation": info.previous.generation if info.previous else None,
    }


def domain_tree(
    infos: Sequence[DomainInfo], waiting_tokens: Mapping[str, int], coverage: Mapping[str, Coverage]
) -> Tree:
    """A tree of domains.

    Args:
        infos: domains; the first one is the root of what is shown, and each but the first comes after its
            parent.
        waiting_tokens: tokens of traffic by domain that no update has taken in yet.
        coverage: of a sample by domain, where one was measured.
    """
    first, *others = infos
    tree = Tree(_node(first, waiting_tokens, coverage), guide_style="dim")
    branches = {first.name: tree}
    for info in others:
        branches[info.name] = branches[info.parent or first.name].add(_node(info, waiting_tokens, coverage))
    return tree


def _node(info: DomainInfo, waiting_tokens: Mapping[str, int], coverage: Mapping[str, Coverage]) -> Text:
    lines = [info.name, _table(info)]
    if "hit_mass" in info.card:
        inherited = float(info.card.get("inherited_mass", 0.0))
        lines.append(
            f"of its own text's n-grams {float(info.card['hit_mass']):.1%} here, {inherited:.1%} inherited"
        )
    if info.layers is not None:
        lines.append("own domain layers")
    if waiting_tokens.get(info.name):
        lines.append(f"{waiting_tokens[info.name]:,} tokens of traffic wait for an update")
    if info.name in coverage:
        lines.append(_sample(coverage[info.name]))
    text = Text("\n".join(lines))
    text.stylize("bold", 0, len(info.name))
    return text


def _table(info: DomainInfo) -> str:
    if info.file is None:
        return "no table"
    budget = f" of {format_bytes(info.plot_bytes)}" if info.plot_bytes else ""
    rows = f"{info.rows:,} n-grams as {info.row_format}, {format_bytes(info.bytes)}{budget}"
    return rows + (f", seen at least {info.admission_count} times" if info.admission_count else "")


def _sample(coverage: Coverage) -> str:
    by_table = ", ".join(f"{name} {rows:,}" for name, rows in coverage.found_in.items() if rows)
    composed = f"; {coverage.composed:,} more of two bigrams each" if coverage.composed else ""
    return (
        f"of the sample's {coverage.windows:,} windows {coverage.share:.1%} found ({by_table or 'none'})"
        f"{composed}; {coverage.distinct_missing:,} different ones missing"
    )
