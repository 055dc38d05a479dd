"""Tensors made of nothing but their size."""

from vllm_mindspore.compiler.torch_map.table import op


@op("aten.arange.default")
def arange(e, node, end, **kwargs):
    return f"F.arange(0, {e(end)}, 1, {e.dtype(e.value(node).dtype)})"


@op("aten.arange.start")
def arange_start(e, node, start, end, **kwargs):
    return f"F.arange({e(start)}, {e(end)}, 1, {e.dtype(e.value(node).dtype)})"


@op("aten.arange.start_step")
def arange_step(e, node, start, end, step=1, **kwargs):
    return f"F.arange({e(start)}, {e(end)}, {e(step)}, {e.dtype(e.value(node).dtype)})"


@op("aten.zeros.default", "aten.empty.memory_format")
def zeros(e, node, shape, **kwargs):
    return f"ops.zeros({e(tuple(shape))}, {e.dtype(e.value(node).dtype)})"


@op("aten.new_zeros.default", "aten.new_empty.default")
def new_zeros(e, node, x, shape, **kwargs):
    return f"ops.zeros({e(tuple(shape))}, {e.dtype(e.value(node).dtype)})"


@op("aten.zeros_like.default", "aten.empty_like.default")
def zeros_like(e, node, x, **kwargs):
    return f"ops.zeros_like({e.cast(x, e.value(node).dtype)})"


@op("aten.ones.default")
def ones(e, node, shape, **kwargs):
    return f"ops.ones({e(tuple(shape))}, {e.dtype(e.value(node).dtype)})"


@op("aten.new_ones.default")
def new_ones(e, node, x, shape, **kwargs):
    return f"ops.ones({e(tuple(shape))}, {e.dtype(e.value(node).dtype)})"


@op("aten.ones_like.default")
def ones_like(e, node, x, **kwargs):
    return f"ops.ones_like({e.cast(x, e.value(node).dtype)})"


@op("aten.full.default")
def full(e, node, shape, fill, **kwargs):
    return f"ops.full({e(tuple(shape))}, {e(fill)}, dtype={e.dtype(e.value(node).dtype)})"


@op("aten.full_like.default")
def full_like(e, node, x, fill, **kwargs):
    return f"ops.full_like({e(x)}, {e(fill)}, dtype={e.dtype(e.value(node).dtype)})"


@op("aten.scalar_tensor.default")
def scalar_tensor(e, node, fill, **kwargs):
    return f"ms.Tensor({e(fill)}, {e.dtype(e.value(node).dtype)})"
