"""Embeddings that are zero at some tokens: an id that no table has, rather than a choice between two rows.

where(positions[:, None] == 0, 0, embedding(ids, weight))   →   embedding(masked_fill(ids, positions == 0, -1), weight)

also where zero is assigned to rows[positions == 0], and with the sum over ranks after the embedding. Drafts leave out
the first token of a text.
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import arguments, call, is_call, operator, operator_name

aten = torch.ops.aten
LOOKUPS = ("embedding", "embedding_shard")


def run(graph: Graph) -> int:
    """Returns the number of choices replaced."""
    replaced = 0
    for node in list(graph.nodes):
        comparison, zero, rows = _choice(node)
        lookup, positions = _lookup(rows), _positions(comparison)
        if lookup is None or positions is None or not _is_zero(zero):
            continue
        ids = lookup.args[0]
        with graph.inserting_before(lookup):
            mask = call(graph, aten.eq.Scalar, positions, comparison.args[1])
            masked = call(graph, aten.masked_fill.Scalar, ids, mask, -1)
        lookup.replace_input_with(ids, masked)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
        replaced += 1
    return replaced


def _choice(node: Node) -> tuple[object, object, object]:
    """(mask, what takes the place of a row, rows); of any other node Nones."""
    if is_call(node, aten.where.self):
        return node.args
    if is_call(node, aten.index_put.default) and len(node.args[1]) == 1 and node.args[3:] in ((), (False,)):
        return node.args[1][0], node.args[2], node.args[0]
    return None, None, None


def _lookup(rows: object) -> Node | None:
    """The embedding behind `rows`, perhaps summed over ranks; None where anything else reads it."""
    while is_call(rows, operator("all_reduce")) and len(rows.users) == 1:
        rows = arguments(rows)["x"]
    is_lookup = isinstance(rows, Node) and operator_name(rows) in LOOKUPS
    return rows if is_lookup and len(rows.users) == 1 else None


def _is_zero(node: object) -> bool:
    return (
        is_call(node, aten.scalar_tensor.default)
        and node.args[0] == 0
        or (isinstance(node, Node) and node.meta.get("number") == 0)
    )


def _positions(comparison: object) -> Node | None:
    """x of x[:, None] == number and of x == number, for an x of tokens that is an input: known before the embedding."""
    source = comparison.args[0] if is_call(comparison, aten.eq.Scalar) else None
    if is_call(source, aten.unsqueeze.default) and source.args[1] in (-1, 1):
        source = source.args[0]
    is_input = isinstance(source, Node) and source.op == "placeholder" and source.meta["val"].dim() == 1
    return source if is_input else None
