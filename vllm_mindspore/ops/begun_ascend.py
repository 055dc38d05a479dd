"""Collectives in two operators on Ascend: HCCL's, by MindSpore's primitives. Checked by export.

What begins one is the collective, which the device runs beside what does not need its result; what ends it is that
result. HCCL orders the additions.
"""

from __future__ import annotations

from mindspore import bfloat16, float32, ops
from mindspore import int64 as ms_int64
from mindspore.ops.auto_generate import gen_ops_prim as prim
from mindspore.ops.operations.comm_ops import AlltoAllVC, ReduceScatterV

from vllm_mindspore.ops.ascend import _Operator
from vllm_mindspore.ops.collectives_ascend import sized


class _Begun(_Operator):
    """Values go in the type that `wire` names."""

    def __init__(self, given, wire):
        super().__init__(given)
        self.wire = bfloat16 if wire == "bfloat16" else float32

    def sent(self, x):
        return self.cast(x, self.wire)


class _Wait(_Operator):
    """What was begun, in float32."""

    def __init__(self, given, **_):
        super().__init__(given)

    def construct(self, begun, *_):
        return self.cast(begun, float32)


class AllReduceStart(_Begun):
    """x: its sum over ranks."""

    def __init__(self, given, wire, group):
        super().__init__(given, wire)
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM, group)

    def construct(self, x):
        return self.reduce(self.sent(x))


class AllReduceWait(_Wait):
    pass


class AllGatherStart(_Begun):
    """The ranks' x one after the other along dim."""

    def __init__(self, given, dim, size, wire, group):
        super().__init__(given, wire)
        self.dim = dim
        self.gather = sized(ops.AllGather, group, size, mean_flag=False)

    def construct(self, x):
        return ops.swapaxes(self.gather(ops.swapaxes(self.sent(x), 0, self.dim)), 0, self.dim)


class AllGatherWait(_Wait):
    pass


class ReduceScatterStart(_Begun):
    """Of the sum over ranks of x this rank's part along dim."""

    def __init__(self, given, dim, size, wire, group):
        super().__init__(given, wire)
        self.dim = dim
        self.scatter = sized(ops.ReduceScatter, group, size, op=ops.ReduceOp.SUM)

    def construct(self, x):
        return ops.swapaxes(self.scatter(ops.swapaxes(self.sent(x), 0, self.dim)), 0, self.dim)


class ReduceScatterWait(_Wait):
    pass


class ReduceScatterRowsStart(_Begun):
    """x [A, N] → [T, N], of the sum over ranks the rows of this rank."""

    def __init__(self, given, rank, size, wire, group):
        super().__init__(given, wire)
        self.ranks = size
        self.scatter = sized(ReduceScatterV, group, size, rank_id=rank, op=ops.ReduceOp.SUM)

    def construct(self, x, token_ranks):
        sizes = self.cast(ops.one_hot(token_ranks, self.ranks).sum(0), ms_int64) * x.shape[1]
        return self.scatter(self.sent(x).reshape((-1,)), sizes).reshape((-1, x.shape[1]))


class ReduceScatterRowsWait(_Wait):
    pass


class AllToAllStart(_Begun):
    """x [sent, N] → [R, N]; counts [size, size] says how many rows each rank sends to each."""

    def __init__(self, given, rank, size, wire, group):
        super().__init__(given, wire)
        self.exchange = sized(AlltoAllVC, group, size, rank_id=rank, block_size=1, transpose=False)

    def construct(self, x, counts):
        values = self.cast(counts, ms_int64) * x.shape[1]
        return self.exchange(self.sent(x).reshape((-1,)), values).reshape((-1, x.shape[1]))


class AllToAllWait(_Wait):
    pass


class Send(_Begun):
    """x to rank `target` of the group."""

    def __init__(self, given, target, wire, group):
        super().__init__(given, wire)
        self.isend = prim.InnerCommIsend()
        self.target, self.group = target, group

    def construct(self, x):
        return self.isend(self.sent(x), self.target, self.group, 0)


class Receive(_Begun):
    """[T, width] from rank `source` of the group, T that of `like`."""

    def __init__(self, given, width, source, wire, group):
        super().__init__(given, wire)
        self.irecv = prim.InnerCommIrecv()
        self.width, self.source, self.group = width, source, group

    def construct(self, like):
        received = self.irecv(0, self.source, (like.shape[0], self.width), self.group, self.wire)
        return self.cast(received, float32)
