"""What the passes share: looking at `vllm_ms` nodes by argument name, and replacing them."""

import operator as python_operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

SPLITS = (torch.ops.aten.split_with_sizes.default, torch.ops.aten.split.Tensor)
LINEARS = ("linear", "linear_int8", "linear_int4")  # alike but for their weights


def operator(name: str) -> torch._ops.OpOverload:
    """The overload of one of our operators, e.g. `operator("linear")`."""
    return getattr(torch.ops.vllm_ms, name).default


def is_call(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def calls(graph: Graph, name: str) -> list[Node]:
    """Every call of our operator `name`, in program order."""
    return graph.find_nodes(op="call_function", target=operator(name))


def is_linear(node: object) -> bool:
    """Whether `node` is a product with a weight, whatever the weight's storage."""
    return isinstance(node, Node) and node.op == "call_function" and operator_name(node) in LINEARS


def operator_name(node: Node) -> str:
    """The name of a call of our operators; empty for any other."""
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "vllm_ms"
    return node.target._schema.name.split("::")[1] if ours else ""


def arguments(node: Node) -> dict[str, object]:
    """The node's arguments by schema name, defaults filled in."""
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values.update({argument.name: value for argument, value in zip(schema, node.args, strict=False)})
    values.update(node.kwargs)
    return values


def create(graph: Graph, name: str, values: dict[str, object], fake: object) -> Node:
    """A call of our operator `name` with arguments by name, at the graph's insert point."""
    target = operator(name)
    node = graph.call_function(target, tuple(values[argument.name] for argument in target._schema.arguments))
    node.meta["val"] = fake
    return node


def call(graph: Graph, target: torch._ops.OpOverload, *args: object) -> Node:
    """A call of any operator on nodes at the graph's insert point; its fake value is computed from theirs."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda argument: argument.meta["val"]))
    return node


def replace(graph: Graph, old: Node, name: str, values: dict[str, object], fake: object = None) -> Node:
    """Put a call of our operator in the place of `old`."""
    with graph.inserting_before(old):
        new = create(graph, name, values, old.meta["val"] if fake is None else fake)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    return new


def same_size(a: object, b: object) -> bool:
    """Whether two sizes are known to be equal: the same integer or the same symbolic expression."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr


def same_shape(a: Node, b: Node) -> bool:
    x, y = a.meta["val"].shape, b.meta["val"].shape
    return len(x) == len(y) and all(map(same_size, x, y))


RESHAPE = torch.ops.aten.reshape.default  # legalization makes every view a reshape


def through_views(node: object) -> object:
    """The tensor behind a chain of views: the same elements in the same order."""
    while is_call(node, RESHAPE):
        node = node.args[0]
    return node


@dataclass(frozen=True)
class Cut:
    """Elements [begin, end) of `tensor` along dimension `dim`, which is not negative."""

    tensor: Node
    dim: int
    begin: int
    end: int


def cut(node: object) -> Cut | None:
    """What `node` cuts if it is a slice or a part of a split, and not empty; None where a size is not known."""
    if is_call(node, torch.ops.aten.slice.Tensor):
        tensor, dim, *bounds, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        size = tensor.meta["val"].shape[dim]
        if step != 1 or any(isinstance(bound, torch.SymInt | Node) for bound in (size, *bounds)):
            return None
        begin, end, _ = slice(*bounds).indices(size)
    elif is_call(node, python_operator.getitem) and is_call(node.args[0], *SPLITS):
        split, index = node.args
        tensor, dim = split.args[0], (*split.args[2:], 0)[0]
        sizes = [part.shape[dim] for part in split.meta["val"]]
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return None
        begin = sum(sizes[:index])
        end = begin + sizes[index]
    else:
        return None
    return Cut(tensor, dim % tensor.meta["val"].dim(), begin, end) if begin < end else None


def same_rotary(a: dict[str, object] | None, b: dict[str, object] | None) -> bool:
    """Whether two tensors are rotated alike: by `rotary` with these arguments but for `x`, or not at all."""
    if a is None or b is None:
        return a is b
    return all(a[name] == b[name] for name in a if name != "x")
