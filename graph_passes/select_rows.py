"""Rows selected from a result before it is computed rather than after: only what is sampled needs the last layer's MLP.

embedding(rows, linear(x, weight, residual=r))   →   linear(embedding(rows, x), weight, residual=embedding(rows, r))

and so on upwards through operators that treat each row by itself, as far as nothing else reads what they compute but a
count of it, which then counts the selected rows.
"""

from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import arguments, call, calls, is_call, operator

# The tensors of each row-wise operator that have the rows of its result.
ROW_TENSORS = {
    "linear": ("x", "residual"),
    "linear_int8": ("x", "residual"),
    "linear_int4": ("x", "residual"),
    "rms_norm": ("x",),
    "layer_norm": ("x",),
    "activation": ("x",),
    "binary": ("x", "y"),
    "binary_scalar": ("x",),
    "moe_route": ("logits",),
    "moe_experts": ("x", "routing", "residual"),
    "moe_place": ("routing",),
    "moe_local": ("routing",),
    "all_reduce": ("x",),  # all ranks select the same rows
}
COUNTS = "moe_count"  # of what is computed


def run(graph: Graph) -> int:
    """Returns the number of operators that now compute the selected rows only."""
    moved = 0
    while any(_move(graph, selection) for selection in reversed(calls(graph, "embedding"))):
        moved += 1
    return moved


def _move(graph: Graph, selection: Node) -> bool:
    values = arguments(selection)
    rows, source = values["ids"], values["weight"]
    names = next((names for name, names in ROW_TENSORS.items() if is_call(source, operator(name))), None)
    if names is None:
        return False
    counts = [user for user in source.users if is_call(user, operator(COUNTS))]
    if set(source.users) != {selection, *counts}:
        return False
    operands = arguments(source)
    if any(operands[name] is not None and operands[name].meta["val"].dim() != 2 for name in names):
        return False
    for name in names:
        if operands[name] is not None:
            operands[name] = _selected(graph, rows, operands[name], source)
    with graph.inserting_before(source):
        narrow = call(graph, source.target, *(operands[item.name] for item in source.target._schema.arguments))
    selection.replace_all_uses_with(narrow)
    for count in counts:
        count.replace_input_with(source, narrow)
    graph.erase_node(selection)
    graph.erase_node(source)
    return True


def _selected(graph: Graph, rows: Node, tensor: Node, before: Node) -> Node:
    """`embedding(rows, tensor)` ahead of `before`; there is one for all who need it."""
    for user in tensor.users:
        if is_call(user, operator("embedding")) and user.args == (rows, tensor):
            if before < user:
                before.prepend(user)
            return user
    with graph.inserting_before(before):
        return call(graph, operator("embedding"), rows, tensor)
