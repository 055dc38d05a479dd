"""Cut columns off a result of ours by an operator of ours: logits of a padded vocabulary are a part of the same step.

slice(ours(...), last dimension, begin, end)   →   columns(ours(...), begin, end)
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import operator_name, replace

SLICE = torch.ops.aten.slice.Tensor


def run(graph: Graph) -> int:
    """Returns the number of slices replaced."""
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=SLICE):
        columns = _columns(node)
        if columns is not None:
            replace(graph, node, "columns", dict(zip(("x", "begin", "end"), columns, strict=True)))
            replaced += 1
    return replaced


def _columns(node: Node) -> tuple[Node, int, int] | None:
    """(what is cut, first column, column after the last), of a slice that can be replaced."""
    source, dim, *bounds, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    value = source.meta["val"]
    width = value.shape[-1]
    whole_rows = dim in (-1, value.dim() - 1) and step == 1
    if not operator_name(source) or value.dtype != torch.float32 or not whole_rows:
        return None
    if isinstance(width, torch.SymInt) or any(isinstance(bound, torch.SymInt | Node) for bound in bounds):
        return None
    begin, end, _ = slice(*bounds).indices(width)
    return (source, begin, end) if begin < end else None
