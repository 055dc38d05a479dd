"""Fold a bias that the model adds by itself into the linear before it.

binary(linear(x, W), b, "add"), b a vector of outputs   →   linear(x, W, bias=b)
"""

from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import arguments, calls, is_linear, operator_name, replace


def run(graph: Graph) -> int:
    """Returns the number of additions folded."""
    fused = 0
    for add in calls(graph, "binary"):
        if add.args[2] != "add":
            continue
        for product, bias in (add.args[:2], add.args[1::-1]):
            if _foldable(product, bias):
                replace(graph, add, operator_name(product), {**arguments(product), "bias": bias})
                fused += 1
                break
    return fused


def _foldable(product: object, bias: object) -> bool:
    if not is_linear(product) or len(product.users) != 1 or not isinstance(bias, Node):
        return False
    values = arguments(product)
    plain = values["bias"] is None and values["residual"] is None and not values["activation"]
    shape = bias.meta["val"].shape
    return plain and bias.op == "placeholder" and len(shape) == 1 and shape[0] == product.meta["val"].shape[-1]
