"""Compute an activation where the linear before it writes its result.

    activation(linear(x, W), a)   →   linear(x, W, activation=a)

For `silu_and_mul` and its kin, W is vLLM's merged [gate; up] weight: the fused operator never writes the two halves.
"""

from torch.fx import Graph

from vllm_mindspore.graph_passes.nodes import arguments, calls, is_linear, operator_name, replace


def run(graph: Graph) -> int:
    """Returns the number of activations fused."""
    fused = 0
    for node in calls(graph, "activation"):
        product, name = node.args
        if not is_linear(product) or len(product.users) != 1:
            continue
        values = arguments(product)
        if values["activation"] or values["residual"] is not None:
            continue
        replace(graph, node, operator_name(product), {**values, "activation": name})
        fused += 1
    return fused
