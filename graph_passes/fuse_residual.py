"""Add the residual stream where the linear before it writes its result.

binary(linear(x, W), residual, "add")   →   linear(x, W, residual=residual)
"""

from torch.fx import Graph

from vllm_mindspore.graph_passes.nodes import arguments, calls, is_linear, operator_name, replace, same_shape


def run(graph: Graph) -> int:
    """Returns the number of additions fused."""
    fused = 0
    for add in calls(graph, "binary"):
        if add.args[2] != "add" or not same_shape(*add.args[:2]):
            continue
        for product, residual in (add.args[:2], add.args[1::-1]):
            if not is_linear(product) or len(product.users) != 1:
                continue
            values = arguments(product)
            if values["residual"] is None:
                replace(graph, add, operator_name(product), {**values, "residual": residual})
                fused += 1
                break
    return fused
