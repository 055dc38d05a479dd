"""Reshaping, transposing, joining and cutting. Nothing here computes."""

import sys

from vllm_mindspore.compiler.torch_map.table import op


@op("aten.reshape.default")
def view(e, node, x, shape):
    return f"ops.reshape({e(x)}, {e.target_shape(node, shape)})"


@op("aten.expand.default")
def expand(e, node, x, shape, implicit=False):
    return f"ops.broadcast_to({e(x)}, {e.target_shape(node, shape)})"


@op("aten.repeat.default")
def repeat(e, node, x, repeats):
    return f"ops.tile({e(x)}, {e(tuple(repeats))})"


@op("aten.transpose.int")
def transpose(e, node, x, first, second):
    order = list(range(e.value(x).dim()))
    first, second = e.dim(x, first), e.dim(x, second)
    order[first], order[second] = order[second], order[first]
    return f"ops.transpose({e(x)}, {e(tuple(order))})"


@op("aten.t.default")
def transpose_matrix(e, node, x):
    return f"ops.transpose({e(x)}, (1, 0))"


@op("aten.permute.default")
def permute(e, node, x, order):
    return f"ops.transpose({e(x)}, {e(tuple(e.dim(x, dim) for dim in order))})"


@op("aten.unsqueeze.default")
def unsqueeze(e, node, x, dim):
    return f"ops.expand_dims({e(x)}, {dim})"


@op("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(e, node, x, dim):
    return f"ops.reshape({e(x)}, {e.target_shape(node, list(e.value(node).shape))})"


@op("aten.cat.default")
def cat(e, node, tensors, dim=0):
    dtype = e.value(node).dtype
    parts = [tensor for tensor in tensors if 0 not in [size for size in e.value(tensor).shape if isinstance(size, int)]]
    if len(parts) == 1:
        return e.cast(parts[0], dtype)
    return f"ops.cat(({', '.join(e.cast(part, dtype) for part in parts)}), {e.dim(node, dim)})"


@op("aten.stack.default")
def stack(e, node, tensors, dim=0):
    return f"ops.stack({e(tuple(tensors))}, {e.dim(node, dim)})"


@op("aten.slice.Tensor")
def slice_(e, node, x, dim=0, start=None, end=None, step=1):
    low = "" if start in (0, None) else e(start)
    high = "" if end is None or (isinstance(end, int) and end == sys.maxsize) else e(end)
    stride = "" if step == 1 else f":{e(step)}"
    return f"{e(x)}[{':, ' * e.dim(x, dim)}{low}:{high}{stride}]"


@op("aten.select.int")
def select(e, node, x, dim, index):
    return f"{e(x)}[{':, ' * e.dim(x, dim)}{e(index)}]"


@op("aten.split.Tensor", "aten.split_with_sizes.default")
def split(e, node, x, sizes, dim=0):
    dim = e.dim(x, dim)
    parts = tuple(int(part.shape[dim]) for part in e.value(node))
    return f"ops.split({e(x)}, {e(parts)}, {dim})"


@op("aten.sym_size.int")
def sym_size(e, node, x, dim):
    return f"{e(x)}.shape[{dim}]"


@op("aten.slice_scatter.default")
def slice_scatter(e, node, x, source, dim=0, start=None, end=None, step=1):
    if step != 1:
        raise NotImplementedError(f"slice_scatter with step {step}")
    dim, prefix = e.dim(x, dim), ":, " * e.dim(x, dim)
    size = e.value(x).shape[dim]
    parts = [e.cast(source, e.value(node).dtype)]
    if start not in (0, None):
        parts.insert(0, f"{e(x)}[{prefix}:{e(start)}]")
    if isinstance(end, int) and isinstance(size, int) and end < size:
        parts.append(f"{e(x)}[{prefix}{e(end)}:]")
    return parts[0] if len(parts) == 1 else f"ops.cat(({', '.join(parts)}), {dim})"
