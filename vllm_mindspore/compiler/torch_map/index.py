"""Gathering and scattering by index."""

from vllm_mindspore.compiler.torch_map.table import op


@op("aten.index_select.default")
def index_select(e, node, x, dim, index):
    return f"ops.gather({e(x)}, {e(index)}, {e.dim(x, dim)})"


@op("aten.index.Tensor")
def index(e, node, x, indices):
    given = [(dim, item) for dim, item in enumerate(indices) if item is not None]
    if len(given) != 1:
        raise NotImplementedError(f"indexing with {len(given)} index tensors: {node.format_node()}")
    dim, item = given[0]
    return f"ops.gather({e(x)}, {e(item)}, {dim})"


@op("aten.gather.default")
def gather(e, node, x, dim, item, sparse_grad=False):
    return f"ops.gather_elements({e(x)}, {e.dim(x, dim)}, {e(item)})"


@op("aten.scatter.src")
def scatter(e, node, x, dim, item, source):
    return f"ops.tensor_scatter_elements({e(x)}, {e(item)}, {e(source)}, {e.dim(x, dim)})"
