"""RMS norm written as arithmetic becomes the norm operator, so that what reads norms finds it.

x * rsqrt(mean(x², last dimension) + eps) * weight     →   rms_norm(x, weight, eps)

The square is `pow(x, 2)`, `square(x)` or `x * x`, and factors may stand in any order (MiniMax's norm of all heads).
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import is_call, operator, replace

aten = torch.ops.aten


def run(graph: Graph) -> int:
    """Returns the number of norms recognized."""
    return sum(_fuse(graph, node) for node in list(graph.nodes))


def _fuse(graph: Graph, node: Node) -> bool:
    for scaled, weight in _factors(node):
        for x, inverse in _factors(scaled):
            epsilon = _epsilon(inverse, x)
            if epsilon is None or not _is_weight(weight, x):
                continue
            replace(graph, node, "rms_norm", {"x": x, "weight": weight, "eps": epsilon, "offset": 0.0})
            return True
    return False


def _factors(node: object) -> list[tuple[Node, Node]]:
    """Both orders of the factors of a product of two tensors."""
    if not is_call(node, operator("binary")) or node.args[2] != "mul":
        return []
    a, b = node.args[:2]
    return [(a, b), (b, a)]


def _is_weight(weight: Node, x: Node) -> bool:
    """Whether `weight` is one vector as long as a row of `x`."""
    shape = weight.meta["val"].shape
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == x.meta["val"].shape[-1]


def _epsilon(inverse: Node, x: Node) -> float | None:
    """eps, if `inverse` is rsqrt(mean(x²) + eps) over the last dimension, which is kept as 1."""
    if not is_call(inverse, aten.rsqrt.default):
        return None
    total = inverse.args[0]
    if not is_call(total, aten.add.Tensor, aten.add.Scalar) or not isinstance(total.args[1], float) or total.kwargs:
        return None
    mean = total.args[0]
    if not is_call(mean, aten.mean.dim) or mean.args[2:3] != (True,):
        return None
    last = x.meta["val"].dim() - 1
    over_rows = [dim % (last + 1) for dim in mean.args[1]] == [last]
    return total.args[1] if over_rows and _is_square(mean.args[0], x) else None


def _is_square(node: Node, x: Node) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[0] is x and node.args[1] == 2
    if is_call(node, aten.square.default):
        return node.args[0] is x
    return is_call(node, operator("binary")) and node.args == (x, x, "mul")
