"""What emitted networks call beside MindSpore's own functions. Graph-mode MindSpore, no torch."""

import mindspore as ms
from mindspore import ops


def arange(start, end, step, dtype):
    """Numbers from start to end (excluded), as a tensor of `dtype`."""
    return ops.cast(ops.range(start, end, step), dtype)


def topk(x, k):
    """The k largest along the last dimension: values, and indices as int64 (PyTorch's type)."""
    values, indices = ops.topk(x, k)
    return values, ops.cast(indices, ms.int64)
