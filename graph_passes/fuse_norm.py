"""Normalize a row where the linear or the experts after it read it.

    linear(rms_norm(x, g), W)       →   linear(x, W, norm_weight=g, norm="rms")
    linear(layer_norm(x, g, b), W)  →   linear(x, W, norm_weight=g, norm_bias=b, norm="layer")

and the same for the x of moe_experts.

A norm that feeds several of them (parallel attention and MLP, a router and its experts) is computed by each: it is
cheap beside a product. A norm with any other user stays.
"""

from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import (
    arguments,
    calls,
    is_call,
    is_linear,
    operator,
    operator_name,
    replace,
)


def run(graph: Graph) -> int:
    """Returns the number of norms fused."""
    return sum(_fuse(graph, norm) for norm in [*calls(graph, "rms_norm"), *calls(graph, "layer_norm")])


def _fuse(graph: Graph, norm: Node) -> bool:
    if not norm.users or not all(_reads_as_input(user, norm) for user in norm.users):
        return False
    values = arguments(norm)
    fused = {
        "x": values["x"],
        "norm_weight": values["weight"],
        "norm_bias": values.get("bias"),
        "norm": "rms" if norm.target is operator("rms_norm") else "layer",
        "eps": values["eps"],
        "norm_offset": values.get("offset", 0.0),
    }
    for product in list(norm.users):
        replace(graph, product, operator_name(product), {**arguments(product), **fused})
    graph.erase_node(norm)
    return True


def _reads_as_input(user: Node, norm: Node) -> bool:
    if not (is_linear(user) or is_call(user, operator("moe_experts"))):
        return False
    values = arguments(user)
    return values["x"] is norm and not values["norm"] and values["residual"] is not norm
