"""Rows of two results side by side by an operator of ours: what a draft reads is a part of the same step.

cat([ours(...), x], last dimension)   →   concat(ours(...), x)
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import operator_name, replace

CAT = torch.ops.aten.cat.default


def run(graph: Graph) -> int:
    """Returns the number of concatenations replaced."""
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=CAT):
        parts = _parts(node)
        if parts is not None:
            replace(graph, node, "concat", dict(zip(("x", "y"), parts, strict=True)))
            replaced += 1
    return replaced


def _parts(node: Node) -> list[Node] | None:
    """The two tensors that are put side by side, of which one is a result of ours."""
    tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    values = [tensor.meta["val"] for tensor in tensors]
    floats = all(value.dtype == torch.float32 for value in values)
    if len(tensors) != 2 or not floats or dim not in (-1, values[0].dim() - 1):
        return None
    return list(tensors) if any(map(operator_name, tensors)) else None
