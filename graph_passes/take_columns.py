"""Cut columns off a result of ours by an operator of ours: logits of a padded vocabulary are a part of the same step.

slice(ours(...), last dimension, begin, end)   →   columns(ours(...), begin, end)
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import is_call, operator_name, replace

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
    source, dim, begin, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    if not is_call(source, source.target) or not operator_name(source):
        return None
    value = source.meta["val"]
    width = value.shape[-1]
    if value.dtype != torch.float32 or dim not in (-1, value.dim() - 1) or step != 1 or not isinstance(width, int):
        return None
    begin, end = (0 if begin is None else begin), (width if end is None else end)
    if not isinstance(begin, int) or not isinstance(end, int):
        return None
    begin, end = (max(0, bound + width if bound < 0 else min(bound, width)) for bound in (begin, end))
    return (source, begin, end) if begin < end else None
