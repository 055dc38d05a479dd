"""Compute equal things once.

    a = split(x, sizes); b = split(x, sizes)   →   a, used for both

In-place updates of a tensor that has views (Falcon's `qkv += bias`) leave one set of views per use behind.
"""

from torch.fx import Graph, Node


def run(graph: Graph) -> int:
    """Returns the number of nodes merged into an earlier equal one."""
    seen: dict[tuple, Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.is_impure() or not node.users:
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            merged += 1
        else:
            seen[key] = node
    return merged


def _frozen(item: object) -> object:
    """A hashable form of arguments; numbers keep their type (1, 1.0 and True differ)."""
    if isinstance(item, (list, tuple)):
        return tuple(_frozen(entry) for entry in item)
    if isinstance(item, dict):
        return tuple((key, _frozen(entry)) for key, entry in sorted(item.items()))
    return item if isinstance(item, Node) else (type(item), str(item))
