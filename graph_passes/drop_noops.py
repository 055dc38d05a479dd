"""Drop nodes that change nothing.

reshape(reshape(x, a), b)   →  reshape(x, b)
reshape(x, x.shape)   →  x
transpose(transpose(x, a, b), a, b)   →  x
expand(x, x.shape)    →  x
slice(x, 0, all)      →  x
slice(slice_scatter(x, y, d, a, b), d, a, b)   →  y
x * 1, x / 1, x + 0   →  x
to(x, x.dtype)        →  x
"""

import sys

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import RESHAPE, is_call, same_shape

aten = torch.ops.aten
NEUTRAL = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
}


def run(graph: Graph) -> int:
    """Returns the number of nodes dropped."""
    dropped = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_call(node, RESHAPE) and is_call(node.args[0], RESHAPE):
            node.update_arg(0, node.args[0].args[0])
            dropped += 1
        if is_call(node, aten.slice.Tensor) and _reads_what_was_written(node):
            node.replace_all_uses_with(node.args[0].args[1])
            graph.erase_node(node)
            dropped += 1
            continue
        if is_call(node, aten.transpose.int) and _undoes_transpose(node, node.args[0]):
            node.replace_all_uses_with(node.args[0].args[0])
            graph.erase_node(node)
            dropped += 1
            continue
        if _is_noop(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            dropped += 1
    return dropped


def _undoes_transpose(node: Node, before: Node) -> bool:
    if not is_call(before, aten.transpose.int):
        return False
    rank = node.meta["val"].dim()
    return {dim % rank for dim in node.args[1:]} == {dim % rank for dim in before.args[1:]}


def _reads_what_was_written(node: Node) -> bool:
    scatter = node.args[0]
    if not is_call(scatter, aten.slice_scatter.default) or not same_shape(node, scatter.args[1]):
        return False
    return _slice_arguments(node.args[1:]) == _slice_arguments(scatter.args[2:])


def _slice_arguments(args: tuple) -> tuple:
    """(dim, start, end, step) with the defaults of `slice` and `slice_scatter`."""
    dim, start, end, step = (*args, *(0, None, None, 1)[len(args) :])
    return dim, start or 0, sys.maxsize if end is None else end, step


def _is_noop(node: Node) -> bool:
    if node.target in (RESHAPE, aten.expand.default):
        return same_shape(node, node.args[0])
    if node.target is aten.slice.Tensor:
        _, start, end, step = _slice_arguments(node.args[1:])
        whole = isinstance(end, int) and end == sys.maxsize
        return start == 0 and (whole or same_shape(node, node.args[0])) and step == 1
    if node.target in NEUTRAL:
        other = node.args[1]
        same_type = not isinstance(other, Node) and node.meta["val"].dtype == node.args[0].meta["val"].dtype
        return same_type and other == NEUTRAL[node.target] and node.kwargs.get("alpha", 1) == 1
    if node.target is aten.to.dtype:
        return node.meta["val"].dtype == node.args[0].meta["val"].dtype
    return False
