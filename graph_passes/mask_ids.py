"""Embeddings that are zero at some tokens: an id that no table has, rather than a choice between two rows.

where(positions[:, None] == 0, 0, embedding(ids, weight))   →   embedding(masked_fill(ids, positions == 0, -1), weight)

also with the sum over ranks between them. Drafts leave out the first token of a text.
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import arguments, call, is_call, operator, operator_name

aten = torch.ops.aten
LOOKUPS = ("embedding", "embedding_shard")


def run(graph: Graph) -> int:
    """Returns the number of choices replaced."""
    replaced = 0
    for choice in list(graph.find_nodes(op="call_function", target=aten.where.self)):
        mask, zero, rows = choice.args
        lookup = _lookup(rows)
        if lookup is None or not _is_zero(zero) or not _is_comparison_of_tokens(mask):
            continue
        ids = lookup.args[0]
        with graph.inserting_before(lookup):
            of_tokens = call(graph, aten.eq.Scalar, mask.args[0].args[0], mask.args[1])
            masked = call(graph, aten.masked_fill.Scalar, ids, of_tokens, -1)
        lookup.replace_input_with(ids, masked)
        choice.replace_all_uses_with(rows)
        graph.erase_node(choice)
        replaced += 1
    return replaced


def _lookup(rows: object) -> Node | None:
    """The embedding behind `rows`, perhaps summed over ranks; None where anything else reads it."""
    while is_call(rows, operator("all_reduce")) and len(rows.users) == 1:
        rows = arguments(rows)["x"]
    is_lookup = isinstance(rows, Node) and operator_name(rows) in LOOKUPS
    return rows if is_lookup and len(rows.users) == 1 else None


def _is_zero(node: object) -> bool:
    return is_call(node, aten.scalar_tensor.default) and node.args[0] == 0


def _is_comparison_of_tokens(mask: object) -> bool:
    """Whether `mask` is x[:, None] == a number, for an x that is an input: known before the embedding is."""
    column = mask.args[0] if is_call(mask, aten.eq.Scalar) else None
    is_column = is_call(column, aten.unsqueeze.default) and column.args[1] in (-1, 1)
    return is_column and column.args[0].op == "placeholder" and column.args[0].meta["val"].dim() == 1
