"""Reductions, softmax, sorting and matrix products that are not linears."""

from vllm_mindspore.compiler.torch_map.table import op


def _dims(e, x, dims):
    return e(tuple(e.dim(x, dim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])))


@op("aten.mean.dim")
def mean(e, node, x, dims, keepdim=False, dtype=None):
    return f"ops.mean({e.cast(x, e.value(node).dtype)}, {_dims(e, x, dims)}, {keepdim})"


@op("aten.sum.dim_IntList")
def sum_(e, node, x, dims, keepdim=False, dtype=None):
    return f"ops.sum({e.cast(x, e.value(node).dtype)}, {_dims(e, x, dims)}, {keepdim})"


@op("aten.amax.default")
def amax(e, node, x, dims=(), keepdim=False):
    return f"ops.amax({e(x)}, {_dims(e, x, dims)}, {keepdim})"


@op("aten.amin.default")
def amin(e, node, x, dims=(), keepdim=False):
    return f"ops.amin({e(x)}, {_dims(e, x, dims)}, {keepdim})"


@op("aten.argmax.default")
def argmax(e, node, x, dim=None, keepdim=False):
    return f"ops.cast(ops.argmax({e(x)}, {e(dim)}, {keepdim}), ms.int64)"


@op("aten.cumsum.default")
def cumsum(e, node, x, dim, dtype=None):
    return f"ops.cumsum({e.cast(x, e.value(node).dtype)}, {e.dim(x, dim)})"


@op("aten._softmax.default")
def softmax(e, node, x, dim, *args, **kwargs):
    return f"ops.softmax({e.cast(x, e.value(node).dtype)}, {e.dim(x, dim)})"


@op("aten._log_softmax.default")
def log_softmax(e, node, x, dim, *args, **kwargs):
    return f"ops.log_softmax({e.cast(x, e.value(node).dtype)}, {e.dim(x, dim)})"


@op("aten.mm.default", "aten.bmm.default")
def matmul(e, node, x, y):
    return f"ops.matmul({e(x)}, {e(y)})"


@op("aten.topk.default")
def topk(e, node, x, k, dim=-1, largest=True, sorted=True):
    if not largest or e.dim(x, dim) != e.value(x).dim() - 1:
        raise NotImplementedError(f"topk of the smallest, or not along the last dimension: {node.format_node()}")
    return f"F.topk({e(x)}, {e(k)})"
