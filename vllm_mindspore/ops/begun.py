"""Collectives in two operators, one that begins it and one that ends it, and what one rank sends to another.

Between the two other operators may run, and other collectives begin and end, up to four at once; all ranks begin and
end in the same order. What begins one returns a value that stands for it. wire: "float32", or "bfloat16" to round the
values on their way to half their bytes; sums are float32, in the order of ranks, and the same on all of them.

Rows of which ranks have unlike numbers: `gather_rows` (ops/exchange.py) gathers them, the operators here scatter sums
of them and send them from all to all. T: this rank's tokens, A: those of all ranks, the first rank's first.
token_ranks [A] int32: the rank of each. counts [size, size] int32: row i says how many rows rank i sends to each.
"""

from __future__ import annotations

from vllm_mindspore.ops.collectives import check_size
from vllm_mindspore.ops.exchange import check_group
from vllm_mindspore.ops.fakes import begun_round, like_input, resized
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

WIRES = ("float32", "bfloat16")

_GROUP = "str wire, str group"
_ALONG = f"int dim, int size, {_GROUP}"
_ROWS = f"int rank, int size, {_GROUP}"


def _reduced_fake(begun, x, *_):
    return like_input(x)


def _gathered_fake(begun, x, dim, size, *_):
    return resized(x, dim, x.shape[dim] * size)


def _scattered_fake(begun, x, dim, size, *_):
    return resized(x, dim, x.shape[dim] // size)


def _rows_fake(begun, x, sizes, own, *_):
    return like_input(x, (own.shape[0], x.shape[1]))


def _received_fake(like, width, *_):
    return like_input(like, (like.shape[0], width))


def _check_wire(given, wire, group, **_):
    if wire not in WIRES:
        raise ValueError(f"wire {wire!r} in group {group!r}: expected {' or '.join(WIRES)}")


def _check_along(given, dim, size, wire, group):
    _check_wire(given, wire, group)
    check_size(given, dim, size, group)


def _check_rows(given, rank, size, wire, group):
    _check_wire(given, wire, group)
    check_group(given, rank, size, group)


def _check_width(given, width, source, wire, group):
    _check_wire(given, wire, group)
    if width < 1:
        raise ValueError(f"width {width} of what group {group!r} brings")


def _operator(name: str, cpu: str, arguments: str, fake, check=_check_wire) -> Operator:
    schema = Schema.parse(f"({arguments}) -> Tensor")
    return Operator(name, schema, fake, cpu, ascend_cell(cpu, "begun_ascend"), check, ordered=True)


OPERATORS = [
    # x f32 of any shape, the same on all ranks; the sum over ranks
    _operator("all_reduce_start", "AllReduceStart", f"Tensor x, {_GROUP}", begun_round),
    _operator("all_reduce_wait", "AllReduceWait", f"Tensor begun, Tensor x, {_GROUP}", _reduced_fake),
    # x f32, the same shape on all ranks; the ranks' x one after the other along dim
    _operator("all_gather_start", "AllGatherStart", f"Tensor x, {_ALONG}", begun_round, _check_along),
    _operator("all_gather_wait", "AllGatherWait", f"Tensor begun, Tensor x, {_ALONG}", _gathered_fake, _check_along),
    # x f32, the same shape on all ranks; of the sum over ranks this rank's part of `size` along dim
    _operator("reduce_scatter_start", "ReduceScatterStart", f"Tensor x, {_ALONG}", begun_round, _check_along),
    _operator(
        "reduce_scatter_wait", "ReduceScatterWait", f"Tensor begun, Tensor x, {_ALONG}", _scattered_fake, _check_along
    ),
    # x f32 [A, N]; own [T, ...]: [T, N], of the sum over ranks the rows of this rank's tokens
    _operator(
        "reduce_scatter_rows_start", "ReduceScatterRowsStart", f"Tensor x, Tensor token_ranks, {_ROWS}", begun_round,
        _check_rows,
    ),
    _operator(
        "reduce_scatter_rows_wait", "ReduceScatterRowsWait",
        f"Tensor begun, Tensor x, Tensor token_ranks, Tensor own, {_ROWS}", _rows_fake, _check_rows,
    ),
    # x f32 [rows that this rank sends, N], those for rank 0 first; own [R, ...]: [R, N], the rows that it gets, those
    # of rank 0 first
    _operator("all_to_all_start", "AllToAllStart", f"Tensor x, Tensor counts, {_ROWS}", begun_round, _check_rows),
    _operator(
        "all_to_all_wait", "AllToAllWait", f"Tensor begun, Tensor x, Tensor counts, Tensor own, {_ROWS}", _rows_fake,
        _check_rows,
    ),
    # x f32 to the other rank of a one-way group, of which this is the first; goes on as soon as x is copied
    _operator("send", "Send", f"Tensor x, int target, {_GROUP}", begun_round),
    # like [T, ...]: [T, width] f32 from the first rank of a one-way group
    _operator("receive", "Receive", f"Tensor like, int width, int source, {_GROUP}", _received_fake, _check_width),
]  # fmt: skip
