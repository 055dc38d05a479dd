"""Compute without a leading batch dimension of 1, which models of vLLM's Transformers backend carry along.

    linear(reshape(x, [1, T, H]), W)      →   reshape(linear(x, W), [1, T, N])
    x + reshape(y, [1, T, H])             →   reshape(reshape(x, [T, H]) + y, [1, T, H])

and so on for what acts on rows: norms, activations, arithmetic, split along the rows. The reshapes move down until they
meet each other (or a transpose meets its inverse) and disappear, so that the fusions see neighbours as neighbours.
"""

import operator as python_operator

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes import drop_noops
from vllm_mindspore.graph_passes.nodes import LINEARS, RESHAPE, SPLITS, arguments, call, is_call, operator, same_size

aten = torch.ops.aten
ROW_WISE = (*LINEARS, "rms_norm", "layer_norm", "activation")


def run(graph: Graph) -> int:
    """Returns the number of operators that now work without the batch dimension."""
    changed = 0
    for node in list(graph.nodes):
        if node.op == "call_function":
            changed += _on_rows(graph, node) or _binary(graph, node) or _split(graph, node) or _view(graph, node)
    if changed:
        drop_noops.run(graph)
    return changed


def _without_batch(node: object) -> Node | None:
    """x [T, …, H], if `node` is x with leading dimensions of 1 added; None if it is not, or x is a vector."""
    if not is_call(node, RESHAPE, aten.unsqueeze.default):
        return None
    x = node.args[0]
    inner, outer = x.meta["val"].shape, node.meta["val"].shape
    added = len(outer) - len(inner)
    if added < 1 or not all(same_size(size, 1) for size in outer[:added]):
        return None
    return x if all(map(same_size, inner, outer[added:])) and _target(outer) is not None else None


def _target(shape: torch.Size) -> list[int] | None:
    """`shape` as the argument of a reshape; None if more than one size is symbolic."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if sizes.count(-1) <= 1 else None


def _put_back(graph: Graph, old: Node, new: Node, rank: int) -> None:
    """Replace `old` by `new`, which is `old` but for its `rank`, reshaped to the shape of `old`."""
    value = old.meta["val"]
    new.meta["val"] = value.reshape(value.shape[value.dim() - rank :])
    restored = call(graph, RESHAPE, new, _target(old.meta["val"].shape))
    old.replace_all_uses_with(restored)
    graph.erase_node(old)


def _on_rows(graph: Graph, node: Node) -> bool:
    if not is_call(node, *map(operator, ROW_WISE)) or arguments(node).get("residual") is not None:
        return False
    x = _without_batch(node.args[0])
    if x is None or x.meta["val"].dim() < 2 or _target(node.meta["val"].shape) is None:
        return False
    with graph.inserting_before(node):
        new = graph.call_function(node.target, (x, *node.args[1:]), dict(node.kwargs))
        _put_back(graph, node, new, x.meta["val"].dim())
    return True


def _binary(graph: Graph, node: Node) -> bool:
    if not is_call(node, operator("binary")) or not all(isinstance(operand, Node) for operand in node.args[:2]):
        return False
    inner = [_without_batch(operand) for operand in node.args[:2]]
    rank = max((x.meta["val"].dim() for x in inner if x is not None), default=0)
    if rank < 2 or _target(node.meta["val"].shape) is None:
        return False
    shapes = [operand.meta["val"].shape for operand in node.args[:2]]
    batch = [shape[: len(shape) - rank] for shape in shapes if len(shape) > rank]
    unknown = any(_target(shape) is None for shape in shapes)
    if unknown or not batch or not all(same_size(size, 1) for sizes in batch for size in sizes):
        return False
    with graph.inserting_before(node):
        operands = [_operand(graph, operand, rank) for operand in node.args[:2]]
        _put_back(graph, node, graph.call_function(node.target, (*operands, node.args[2])), rank)
    return True


def _operand(graph: Graph, node: Node, rank: int) -> Node:
    shape, x = node.meta["val"].shape, _without_batch(node)
    if x is not None and x.meta["val"].dim() == rank:
        return x
    return node if len(shape) <= rank else call(graph, RESHAPE, node, _target(shape[len(shape) - rank :]))


def _split(graph: Graph, node: Node) -> bool:
    if not is_call(node, *SPLITS) or len(node.args) < 3:
        return False
    x, last = _without_batch(node.args[0]), node.args[0].meta["val"].dim() - 1
    if x is None or x.meta["val"].dim() < 2 or node.args[2] not in (-1, last):
        return False
    if not all(is_call(user, python_operator.getitem) for user in node.users):
        return False
    with graph.inserting_before(node):
        parts = call(graph, node.target, x, node.args[1], -1)
    for user in list(node.users):
        with graph.inserting_before(user):
            part = graph.call_function(python_operator.getitem, (parts, user.args[1]))
            part.meta["val"] = parts.meta["val"][user.args[1]]
            restored = call(graph, RESHAPE, part, _target(user.meta["val"].shape))
        user.replace_all_uses_with(restored)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def _view(graph: Graph, node: Node) -> bool:
    """Sizes, views and the only entry of a batch are taken of the tensor without it; not counted by themselves."""
    x = _without_batch(node.args[0]) if node.args else None
    if x is None:
        return False
    added = node.args[0].meta["val"].dim() - x.meta["val"].dim()
    if is_call(node, RESHAPE):
        node.update_arg(0, x)
    elif is_call(node, aten.sym_size.int) and node.args[1] >= added:
        node.args = (x, node.args[1] - added)
    elif is_call(node, aten.select.int) and node.args[1:] == (0, 0) and added == 1:
        node.replace_all_uses_with(x)
        graph.erase_node(node)
    return False
