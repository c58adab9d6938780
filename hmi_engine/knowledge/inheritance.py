"""Which nodes of the domain tree a lookup searches."""

from collections.abc import Callable

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.records import DomainInfo

__all__ = ["inheritance_chain"]


def inheritance_chain(name: str, find: Callable[[str], DomainInfo]) -> list[DomainInfo]:
    """Return the nodes to search for a row, from the domain ``name`` towards the root.

    Only ancestors of the same layer identity belong to it: where the domain layers change, the rows do.
    ``find`` returns a node by name, and its errors are passed on; raises :class:`StoreCorruptError` if the
    tree has a loop.
    """
    chain = [find(name)]
    while (parent := chain[-1].parent) is not None:
        node = find(parent)
        if node.layer_identity != chain[0].layer_identity:
            break
        if node.id in {visited.id for visited in chain}:
            raise StoreCorruptError(f"domain {name!r} is its own ancestor; run `hmi verify`")
        chain.append(node)
    return chain
