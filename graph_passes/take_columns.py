"""Cut columns off a result of ours by an operator of ours, so that what reads them is a part of the same step.

slice(ours(...), last dimension, begin, end)   →   columns(ours(...), begin, end, 1)        a padded vocabulary
split(ours(...), sizes, last dimension)[i]     →   columns(ours(...), begin, end, 1)
split(reshape(ours(...), [T, parts, n, size]), sizes, 2)[i]
                                               →   reshape(columns(ours(...), begin * size, end * size, parts), …)

The last is a projection in which queries, keys and values take turns, a KV head after the other (InternLM 2).
"""

import operator as python_operator
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes import drop_noops
from vllm_mindspore.graph_passes.nodes import (
    RESHAPE,
    SPLITS,
    call,
    is_call,
    operator,
    operator_name,
    same_size,
    through_views,
)

SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class _Cut:
    """Elements [begin, end) of `tensor` along dimension `dim`."""

    tensor: Node
    dim: int
    begin: int
    end: int


def run(graph: Graph) -> int:
    """Returns the number of slices and of parts of splits replaced."""
    replaced = sum(_replace(graph, node) for node in list(graph.nodes))
    if replaced:
        drop_noops.run(graph)
    return replaced


def _replace(graph: Graph, node: Node) -> bool:
    cut = _cut(node)
    columns = None if cut is None else _columns(cut)
    if columns is None:
        return False
    shape = node.meta["val"].shape
    with graph.inserting_before(node):
        new = call(graph, operator("columns"), *columns)
        if new.meta["val"].dim() != len(shape):
            new = call(graph, RESHAPE, new, [-1, *shape[1:]])
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _cut(node: Node) -> _Cut | None:
    """What `node` cuts, if it is a slice or a part of a split, and all sizes are known."""
    if is_call(node, SLICE):
        tensor, dim, *bounds, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        size = tensor.meta["val"].shape[dim]
        if step != 1 or any(isinstance(bound, torch.SymInt | Node) for bound in (size, *bounds)):
            return None
        begin, end, _ = slice(*bounds).indices(size)
    elif is_call(node, python_operator.getitem) and is_call(node.args[0], *SPLITS):
        split, index = node.args
        tensor, dim = split.args[0], (*split.args[2:], 0)[0]
        sizes = [part.shape[dim] for part in split.meta["val"]]
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return None
        begin = sum(sizes[:index])
        end = begin + sizes[index]
    else:
        return None
    return _Cut(tensor, dim % tensor.meta["val"].dim(), begin, end) if begin < end else None


def _columns(cut: _Cut) -> tuple[Node, int, int, int] | None:
    """The arguments of `columns`, if a result of ours is cut along its rows."""
    source, shape = through_views(cut.tensor), cut.tensor.meta["val"].shape
    if not operator_name(source) or source.meta["val"].dtype != torch.float32:
        return None
    if source is cut.tensor and cut.dim == len(shape) - 1:
        return source, cut.begin, cut.end, 1
    rows = source.meta["val"].shape
    if len(rows) != 2 or cut.dim == 0 or not same_size(rows[0], shape[0]):
        return None
    if any(isinstance(size, torch.SymInt) for size in shape[1:]):
        return None
    size = prod(shape[cut.dim + 1 :])
    return source, cut.begin * size, cut.end * size, prod(shape[1 : cut.dim])
