"""Attention reads rows: views before it that only say which element belongs to which head are dropped.

kv_write(kv_cache, reshape(k, [T, heads, size]), reshape(v, …), …)   →   kv_write(kv_cache, k, v, …)
paged_attention(reshape(q, [T, heads, size]), …)                     →   paged_attention(q, …)

k, v and q are [T, heads * size].
"""

from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import calls, same_size, through_views

ROWS = {"kv_write": (1, 2), "paged_attention": (0,)}  # positions of the arguments


def run(graph: Graph) -> int:
    """Returns the number of arguments that are read without a view."""
    return sum(_drop(node, position) for name in ROWS for node in calls(graph, name) for position in ROWS[name])


def _drop(node: Node, position: int) -> bool:
    view = node.args[position]
    rows = through_views(view)
    shape = rows.meta["val"].shape
    if rows is view or len(shape) != 2 or not same_size(shape[0], view.meta["val"].shape[0]):
        return False
    node.update_arg(position, rows)
    return True
