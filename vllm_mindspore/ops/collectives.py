"""Collectives between the ranks of a group, which vllm_mindspore.distributed makes before a graph runs."""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input, resized
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell


def group_in_graphs(unique_name: str) -> str:
    """Of vLLM's "tp:0" the part that graphs name: "tp". A process is in one engine's groups only."""
    return unique_name.split(":")[0]


def _all_reduce_fake(x, group):
    return like_input(x)


def _all_gather_fake(x, dim, size, group):
    return resized(x, dim, x.shape[dim] * size)


def _reduce_scatter_fake(x, dim, size, group):
    return resized(x, dim, x.shape[dim] // size)


def check_size(given, dim, size, group):
    """Of collectives of parts along a dimension."""
    if size < 1 or dim < 0:
        raise ValueError(f"dim {dim} and size {size} of group {group!r}: expected dim >= 0 and size >= 1")


# `ordered`: all ranks must come to their collectives in the same order. Sums are taken in the order of ranks.
OPERATORS = [
    Operator(
        # x f32, the same shape on all ranks; the sum over ranks
        name="all_reduce",
        schema=Schema.parse("(Tensor x, str group) -> Tensor"),
        fake=_all_reduce_fake,
        cpu="AllReduce",
        ascend=ascend_cell("AllReduce", "collectives_ascend"),
        ordered=True,
    ),
    Operator(
        # x f32, the same shape on all ranks; the ranks' x one after the other along dim. size: ranks of the group
        name="all_gather",
        schema=Schema.parse("(Tensor x, int dim, int size, str group) -> Tensor"),
        fake=_all_gather_fake,
        cpu="AllGather",
        ascend=ascend_cell("AllGather", "collectives_ascend"),
        check=check_size,
        ordered=True,
    ),
    Operator(
        # x f32, the same shape on all ranks; of the sum over ranks this rank's part of `size` along dim
        name="reduce_scatter",
        schema=Schema.parse("(Tensor x, int dim, int size, str group) -> Tensor"),
        fake=_reduce_scatter_fake,
        cpu="ReduceScatter",
        ascend=ascend_cell("ReduceScatter", "collectives_ascend"),
        check=check_size,
        ordered=True,
    ),
]
