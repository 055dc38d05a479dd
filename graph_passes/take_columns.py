"""Cut columns off a result of ours by an operator of ours, so that what reads them is a part of the same step.

slice(ours(...), last dimension, begin, end)   →   columns(ours(...), begin, end, 1)        a padded vocabulary
split(ours(...), sizes, last dimension)[i]     →   columns(ours(...), begin, end, 1)
split(reshape(ours(...), [T, parts, n, size]), sizes, 2)[i]
                                               →   reshape(columns(ours(...), begin * size, end * size, parts), …)

The last is a projection in which queries, keys and values take turns, a KV head after the other (InternLM 2).
"""

from math import prod

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes import drop_noops
from vllm_mindspore.graph_passes.nodes import (
    RESHAPE,
    Cut,
    call,
    cut,
    operator,
    operator_name,
    same_size,
    through_views,
)


def run(graph: Graph) -> int:
    """Returns the number of slices and of parts of splits replaced."""
    replaced = sum(_replace(graph, node) for node in list(graph.nodes))
    if replaced:
        drop_noops.run(graph)
    return replaced


def _replace(graph: Graph, node: Node) -> bool:
    part = cut(node)
    columns = None if part is None else _columns(part)
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


def _columns(part: Cut) -> tuple[Node, int, int, int] | None:
    """The arguments of `columns`, if a result of ours is cut along its rows."""
    source, shape = through_views(part.tensor), part.tensor.meta["val"].shape
    if not operator_name(source) or source.meta["val"].dtype != torch.float32:
        return None
    if source is part.tensor and part.dim == len(shape) - 1:
        return source, part.begin, part.end, 1
    rows = source.meta["val"].shape
    if len(rows) != 2 or part.dim == 0 or not same_size(rows[0], shape[0]):
        return None
    if any(isinstance(size, torch.SymInt) for size in shape[1:]):
        return None
    size = prod(shape[part.dim + 1 :])
    return source, part.begin * size, part.end * size, prod(shape[1 : part.dim])
