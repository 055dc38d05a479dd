"""Collectives on Ascend: MindSpore's own, which are HCCL's. Checked by export on any machine.

Their group must have been made with `mindspore.communication.create_group` under the name that the graph uses.
"""

from __future__ import annotations

from mindspore import ops
from mindspore.ops.primitive import PrimitiveWithInfer

from vllm_mindspore.ops.ascend import _Operator


def sized(primitive: type[PrimitiveWithInfer], group: str, size: int, **attributes) -> PrimitiveWithInfer:
    """A collective of `size` ranks. Its own constructor asks the communicator, which an export does not have."""
    made = primitive.__new__(primitive)
    PrimitiveWithInfer.__init__(made, primitive.__name__)
    made.group, made.rank_size = group, size
    for name, value in {"group": group, "rank_size": size, "fusion": 0, "no_eliminate": True, **attributes}.items():
        made.add_prim_attr(name, value)
    return made


class AllReduce(_Operator):
    """x: its sum over ranks. HCCL chooses the order of additions."""

    def __init__(self, given, group):
        super().__init__(given)
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM, group)

    def construct(self, x):
        return self.reduce(x)


class AllGather(_Operator):
    """The ranks' x one after the other along dim."""

    def __init__(self, given, dim, size, group):
        super().__init__(given)
        self.dim = dim
        self.gather = sized(ops.AllGather, group, size, mean_flag=False)

    def construct(self, x):
        return ops.swapaxes(self.gather(ops.swapaxes(x, 0, self.dim)), 0, self.dim)


class ReduceScatter(_Operator):
    """Of the sum over ranks of x this rank's part along dim."""

    def __init__(self, given, dim, size, group):
        super().__init__(given)
        self.dim = dim
        self.scatter = sized(ops.ReduceScatter, group, size, op=ops.ReduceOp.SUM)

    def construct(self, x):
        return ops.swapaxes(self.scatter(ops.swapaxes(x, 0, self.dim)), 0, self.dim)
