"""Arithmetic of a result of ours with a constant by an operator of ours: layers that scale are a part of the same step.

ours(...) * c   →   binary_scalar(ours(...), c, "mul")      and so for +, - and /
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import operator_name, replace

aten = torch.ops.aten
NAMES = {
    getattr(getattr(aten, name), overload): name
    for name in ("add", "sub", "mul", "div")
    for overload in ("Tensor", "Scalar")
}


def run(graph: Graph) -> int:
    """Returns the number of operations replaced."""
    replaced = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in NAMES and _is_ours_with_constant(node):
            x, y = node.args
            replace(graph, node, "binary_scalar", {"x": x, "y": float(y), "op": NAMES[node.target]})
            replaced += 1
    return replaced


def _is_ours_with_constant(node: Node) -> bool:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Node):
        return False
    x, y = node.args
    is_float32 = x.meta["val"].dtype == node.meta["val"].dtype == torch.float32
    return bool(operator_name(x)) and is_float32 and isinstance(y, int | float)
