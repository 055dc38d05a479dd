"""Let the experts write what follows them: a factor of their result, and the residual stream.

moe_experts(x, moe_route(l, scale=s), …) * c                       →   moe_experts(x, moe_route(l, scale=s * c), …)
binary(moe_experts(…), residual, "add")                            →   moe_experts(…, residual=residual)
binary(binary(shared, moe_experts(…), "add"), residual, "add")     →   binary(shared, moe_experts(…, residual), "add")

In the last, `fuse_residual` can then let the shared expert's linear write the sum.
"""

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import arguments, calls, create, is_call, operator, replace, same_shape

SCALINGS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)


def run(graph: Graph) -> int:
    """Returns the number of factors and additions fused."""
    fused = 0
    for experts in calls(graph, "moe_experts"):
        if (scaling := _factor_after(experts)) is not None:
            _scale_routing(graph, experts, scaling)
            fused += 1
        fused += _fuse_residual(graph, experts)
    return fused


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _factor_after(experts: Node) -> Node | None:
    """The multiplication by a constant that is the only use of `experts`, where the weights of routing can take it."""
    user, values = _only_user(experts), arguments(experts)
    if not is_call(user, *SCALINGS) or not isinstance(user.args[1], (int, float)):
        return None
    linear = values["residual"] is None and not values["weight_on_input"]
    routing = values["routing"]
    return user if linear and is_call(routing, operator("moe_route")) and _only_read_by(experts, routing) else None


def _only_read_by(experts: Node, routing: Node) -> bool:
    """Whether nothing else depends on the weights of `routing`."""
    return all(user is experts or is_call(user, operator("moe_count")) for user in routing.users)


def _scale_routing(graph: Graph, experts: Node, scaling: Node) -> None:
    routing = arguments(experts)["routing"]
    values = arguments(routing)
    replace(graph, routing, "moe_route", {**values, "scale": values["scale"] * scaling.args[1]})
    scaling.replace_all_uses_with(experts)
    graph.erase_node(scaling)


def _fuse_residual(graph: Graph, experts: Node) -> bool:
    """Whether the last of the additions after `experts` was moved into it."""
    first = _addition_after(experts)
    if first is None or arguments(experts)["residual"] is not None:
        return False
    second = _addition_after(first)
    last = first if second is None else second
    before = experts if second is None else first
    residual = _other(last, before)
    with graph.inserting_before(last):
        fused = create(graph, "moe_experts", {**arguments(experts), "residual": residual}, experts.meta["val"])
        if second is not None:
            shared = _other(first, experts)
            fused = create(graph, "binary", {"x": shared, "y": fused, "op": "add"}, last.meta["val"])
    last.replace_all_uses_with(fused)
    for node in dict.fromkeys((last, first, experts)):
        graph.erase_node(node)
    return True


def _addition_after(node: Node) -> Node | None:
    """The addition of `node` and another tensor of its shape that is the only use of `node`."""
    user = _only_user(node)
    if not is_call(user, operator("binary")) or user.args[2] != "add" or user.args[0] is user.args[1]:
        return None
    return user if same_shape(*user.args[:2]) else None


def _other(add: Node, operand: Node) -> Node:
    return add.args[1] if add.args[0] is operand else add.args[0]
