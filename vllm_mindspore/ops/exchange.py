"""What data-parallel ranks exchange around a layer of experts, each in two operators: one begins, the other ends it.

T: this rank's tokens, A: those of all ranks, the first rank's first. token_ranks [A] int32: the rank of each. Between
the two operators others may run; what begins an exchange returns a value that stands for it.

capacity, columns, column: experts have places, `capacity` of them on each of the expert-parallel ranks, of which
`columns` are one row and a column is the group that exchanges; capacity 0: every rank has a part of every expert. rank,
size: of this rank and of that group.
"""

from __future__ import annotations

from vllm_mindspore.ops.fakes import begun_round, like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

_GROUP = "int rank, int size, str group"
_HOLDERS = f"int capacity, int columns, int column, {_GROUP}"


def _gather_fake(begun, x, token_ranks, *_):
    return like_input(x, (token_ranks.shape[0], x.shape[1]))


def _dispatch_fake(begun, x, routing, token_ranks, *_):
    return like_input(x, (token_ranks.shape[0], x.shape[1]))


def _combine_fake(begun, y, routing, token_ranks, own, *_):
    return like_input(y, (own.shape[0], y.shape[1]))


def check_group(given, rank, size, group):
    """Of operators that are made for one rank."""
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} in group {group!r}")


def _check_holders(given, capacity, columns, column, rank, size, group):
    check_group(given, rank, size, group)
    if capacity < 0 or not 0 <= column < columns:
        raise ValueError(f"capacity {capacity}, column {column} of {columns}: expected capacity >= 0, column < columns")


OPERATORS = [
    Operator(
        # x [T, N]
        name="gather_rows_start",
        schema=Schema.parse(f"(Tensor x, Tensor token_ranks, {_GROUP}) -> Tensor"),
        fake=begun_round,
        cpu="GatherRowsStart",
        ascend=ascend_cell("GatherRowsStart", "exchange_ascend"),
        check=check_group,
        ordered=True,
    ),
    Operator(
        # x as before; [A, N]: the rows of all ranks
        name="gather_rows_wait",
        schema=Schema.parse(f"(Tensor begun, Tensor x, Tensor token_ranks, {_GROUP}) -> Tensor"),
        fake=_gather_fake,
        cpu="GatherRowsWait",
        ascend=ascend_cell("GatherRowsWait", "exchange_ascend"),
        check=check_group,
        ordered=True,
    ),
    Operator(
        # x [T, N]
        name="moe_dispatch_start",
        schema=Schema.parse(f"(Tensor x, Tensor token_ranks, {_GROUP}) -> Tensor"),
        fake=begun_round,
        cpu="MoeDispatchStart",
        ascend=ascend_cell("MoeDispatchStart", "exchange_ascend"),
        check=check_group,
        ordered=True,
    ),
    Operator(
        # x as before, routing [A, 2 * top_k] with places for ids; [A, N]: the rows of tokens that have an expert on
        # this rank, zeros for the others
        name="moe_dispatch_wait",
        schema=Schema.parse(f"(Tensor begun, Tensor x, Tensor routing, Tensor token_ranks, {_HOLDERS}) -> Tensor"),
        fake=_dispatch_fake,
        cpu="MoeDispatchWait",
        ascend=ascend_cell("MoeDispatchWait", "exchange_ascend"),
        check=_check_holders,
        ordered=True,
    ),
    Operator(
        # y [A, N]: what this rank's experts computed for all tokens; routing as above
        name="moe_combine_start",
        schema=Schema.parse(f"(Tensor y, Tensor routing, Tensor token_ranks, {_HOLDERS}) -> Tensor"),
        fake=begun_round,
        cpu="MoeCombineStart",
        ascend=ascend_cell("MoeCombineStart", "exchange_ascend"),
        check=_check_holders,
        ordered=True,
    ),
    Operator(
        # y and routing as before, own [T, ...]; [T, N]: for this rank's tokens the sum over ranks, in their order
        name="moe_combine_wait",
        schema=Schema.parse(
            f"(Tensor begun, Tensor y, Tensor routing, Tensor token_ranks, Tensor own, {_HOLDERS}) -> Tensor"
        ),
        fake=_combine_fake,
        cpu="MoeCombineWait",
        ascend=ascend_cell("MoeCombineWait", "exchange_ascend"),
        check=_check_holders,
        ordered=True,
    ),
]
