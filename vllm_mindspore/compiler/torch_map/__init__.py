"""The table PyTorch operator → MindSpore expression, one small function per operator, grouped by kind.

A function takes the expression writer `e` and the node's arguments, and returns the text of a MindSpore expression:

    @op("aten.relu.default")
    def relu(e, node, x):
        return f"ops.relu({e(x)})"

`e(x)` is the text of an operand. Operators of our own library (`vllm_ms.*`) need no entry: their schema says it all.
"""

from vllm_mindspore.compiler.torch_map import create, index, pointwise, reduce, shape
from vllm_mindspore.compiler.torch_map.table import TABLE, op

__all__ = ["TABLE", "create", "index", "op", "pointwise", "reduce", "shape"]
