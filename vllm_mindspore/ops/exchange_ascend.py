"""Exchanges around experts on Ascend: all rows to all ranks, and sums of all ranks' results. Checked by export.

Which sizes ranks have is a tensor of the step, which MindSpore's AllGatherV and ReduceScatterV (HCCL's) take. What
begins an exchange is the collective, which the device runs beside what does not need its result; what ends it is that
result.
"""

from __future__ import annotations

from mindspore import int64 as ms_int64
from mindspore import ops
from mindspore.ops.operations.comm_ops import AllGatherV, ReduceScatterV

from vllm_mindspore.ops.ascend import _Operator
from vllm_mindspore.ops.collectives_ascend import sized


class _Exchange(_Operator):
    """Rows [T, N] of each rank; sizes: how many values each has."""

    def __init__(self, given, rank, size, group):
        super().__init__(given)
        self.ranks = size
        self.named = {"group": group, "size": size, "rank_id": rank}

    def sizes(self, token_ranks, width):
        return self.cast(ops.one_hot(token_ranks, self.ranks).sum(0), ms_int64) * width


class GatherRowsStart(_Exchange):
    """x [T, N] → [A, N], the rows of all ranks."""

    def __init__(self, given, rank, size, group):
        super().__init__(given, rank, size, group)
        self.gather = sized(AllGatherV, **self.named, mean_flag=False)

    def construct(self, x, token_ranks):
        rows = self.gather(x.reshape((-1,)), self.sizes(token_ranks, x.shape[1]))
        return rows.reshape((token_ranks.shape[0], x.shape[1]))


class GatherRowsWait(_Operator):
    """What was begun."""

    def __init__(self, given, rank, size, group):
        super().__init__(given)

    def construct(self, begun, x, token_ranks):
        return begun


class MoeDispatchStart(GatherRowsStart):
    """As gather_rows: experts leave out the tokens that are not theirs."""


class MoeDispatchWait(_Operator):
    """What was begun."""

    def __init__(self, given, capacity, columns, column, rank, size, group):
        super().__init__(given)

    def construct(self, begun, x, routing, token_ranks):
        return begun


class MoeCombineStart(_Exchange):
    """y [A, N] → [T, N], the sum over ranks; y is zero for tokens without an expert here. HCCL orders the additions."""

    def __init__(self, given, capacity, columns, column, rank, size, group):
        super().__init__(given, rank, size, group)
        self.scatter = sized(ReduceScatterV, **self.named, op=ops.ReduceOp.SUM)

    def construct(self, y, routing, token_ranks):
        return self.scatter(y.reshape((-1,)), self.sizes(token_ranks, y.shape[1])).reshape((-1, y.shape[1]))


class MoeCombineWait(_Operator):
    """What was begun."""

    def __init__(self, given, capacity, columns, column, rank, size, group):
        super().__init__(given)

    def construct(self, begun, y, routing, token_ranks, own):
        return begun
