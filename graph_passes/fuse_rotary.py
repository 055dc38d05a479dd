"""Rotary embedding written as arithmetic becomes the rotary operator, so that fuse_attention finds it.

rotate_half(x) = cat(-x[..., R/2:R], x[..., :R/2])
x[..., :R] * cos + rotate_half(x) * sin, then the rest of x     →   rotary(positions, x, table)

x is [T, heads, head_size] (vLLM) or [1, heads, T, head_size] (Hugging Face, through vLLM's Transformers backend; the
transposes this leaves behind cancel in drop_batch). cos and sin hold each of their R/2 values twice. They are either

- rows of a table, `cos, sin = chunk(table[positions], 2)`: the operator reads that table itself (Phi-3's LongRoPE); or
- computed from the positions of this step, which is the same for all layers: the step's values become a table of T
  rows, `cat(cos[:, :R/2], sin[:, :R/2])`, and positions = 0 … T-1 its rows (Hugging Face's OLMo 2).
"""

import operator as python_operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from vllm_mindspore.graph_passes.nodes import RESHAPE, SPLITS, call, create, cut, is_call, operator, same_size

aten = torch.ops.aten
POINTWISE = (aten.cos.default, aten.sin.default, aten.mul.Tensor, aten.mul.Scalar)


@dataclass(frozen=True)
class _Rotation:
    """`x * cos + rotate_half(x) * sin` of the first `rotary_dim` elements of each head of `x`; `end` is its result."""

    end: Node
    x: Node
    cos: Node
    sin: Node
    rotary_dim: int


def run(graph: Graph) -> int:
    """Returns the number of tensors whose rotation was recognized (two a layer: q and k)."""
    tables: dict[tuple[Node, Node], tuple[Node, Node] | None] = {}
    fused = 0
    for node in list(graph.nodes):
        rotation = _rotation(node)
        if rotation is None or not _token_major(rotation):
            continue
        key = rotation.cos, rotation.sin
        if key not in tables:
            tables[key] = _indexed_table(rotation) or _computed_table(graph, rotation)
        if tables[key] is not None:
            _replace(graph, rotation, *tables[key])
            fused += 1
    return fused


def _rotation(node: Node) -> _Rotation | None:
    if not is_call(node, operator("binary")) or node.args[2] != "add":
        return None
    for direct, rotated in (node.args[:2], node.args[1::-1]):
        for part, cos in _products(direct):
            for half, sin in _products(rotated):
                if _is_rotate_half(half, part):
                    return _whole_heads(node, part, cos, sin)
    return None


def _products(node: object) -> list[tuple[Node, Node]]:
    """Both orders of the factors of a product of two tensors."""
    if not is_call(node, operator("binary")) or node.args[2] != "mul" or len(node.users) != 1:
        return []
    a, b = node.args[:2]
    return [(a, b), (b, a)] if isinstance(a, Node) and isinstance(b, Node) else []


def _is_rotate_half(node: Node, part: Node) -> bool:
    if not is_call(node, aten.cat.default) or not _joins_last(node, 2) or part.meta["val"].dim() < 1:
        return False
    width = part.meta["val"].shape[-1]
    if not isinstance(width, int) or width % 2:
        return False
    negated, first = node.args[0]
    if not is_call(negated, aten.neg.default):
        return False
    return _is_slice(negated.args[0], part, width // 2, width) and _is_slice(first, part, 0, width // 2)


def _joins_last(cat: Node, count: int) -> bool:
    dim = cat.args[1] if len(cat.args) > 1 else 0
    return len(cat.args[0]) == count and dim in (-1, cat.meta["val"].dim() - 1)


def _is_slice(node: object, source: Node, begin: int, end: int) -> bool:
    """Whether `node` is source[..., begin:end], as a slice or as a part of a split."""
    part, last = cut(node), source.meta["val"].dim() - 1
    return part is not None and part.tensor is source and (part.dim, part.begin, part.end) == (last, begin, end)


def _whole_heads(end: Node, part: Node, cos: Node, sin: Node) -> _Rotation:
    """The rotation of whole heads, if `part` is their beginning and the rest is joined to the result unchanged."""
    rotary_dim = part.meta["val"].shape[-1]
    first = cut(part)
    whole = part if first is None else first.tensor
    for source in (whole, part) if _is_slice(part, whole, 0, rotary_dim) else (part,):
        for user in end.users:
            if not is_call(user, aten.cat.default) or not _joins_last(user, 2) or user.args[0][0] is not end:
                continue
            if _is_slice(user.args[0][1], source, rotary_dim, source.meta["val"].shape[-1]) and len(end.users) == 1:
                return _Rotation(user, source, cos, sin, rotary_dim)
    return _Rotation(end, part, cos, sin, rotary_dim)


def _token_major(rotation: _Rotation) -> bool:
    """Whether x has one of the two layouts, its heads a known size, and cos and sin one row of values per token."""
    shape = rotation.x.meta["val"].shape
    if len(shape) != 3 and not (len(shape) == 4 and same_size(shape[0], 1)):
        return False
    if not isinstance(shape[1], int) or not isinstance(shape[-1], int):
        return False
    tokens = 0 if len(shape) == 3 else 2
    wanted = [1] * len(shape)
    wanted[tokens], wanted[-1] = shape[tokens], rotation.rotary_dim
    found = [node.meta["val"].shape for node in (rotation.cos, rotation.sin)]
    return all(len(sizes) == len(wanted) and all(map(same_size, sizes, wanted)) for sizes in found)


def _indexed_table(rotation: _Rotation) -> tuple[Node, Node] | None:
    """(positions, table) if cos and sin are the first and the second half of table[positions]."""
    rows = [_half_of_rows(node, part) for part, node in enumerate((rotation.cos, rotation.sin))]
    if rows[0] is None or rows[0] is not rows[1]:
        return None
    table, dim, positions = rows[0].args
    is_table = dim in (0, -2) and table.meta["val"].dim() == 2 and table.meta["val"].shape[1] == rotation.rotary_dim
    if not is_table or positions.meta["val"].dim() != 1 or positions.meta["val"].dtype != torch.int64:
        return None
    _move_to_the_top(positions)
    return positions, table


def _half_of_rows(node: Node, part: int) -> Node | None:
    """The index_select of whose rows `node` holds half number `part`, twice."""
    half = _once(node)
    if not is_call(half, python_operator.getitem) or half.args[1] != part:
        return None
    split = half.args[0]
    if not is_call(split, *SPLITS) or len(split.meta["val"]) != 2 or split.meta["val"][0].dim() != 2:
        return None
    widths = [piece.shape[-1] for piece in split.meta["val"]]
    on_columns = len(split.args) > 2 and split.args[2] in (-1, 1)
    rows = split.args[0]
    return rows if on_columns and widths[0] == widths[1] and is_call(rows, aten.index_select.default) else None


def _once(node: object, pointwise: tuple = ()) -> Node | None:
    """y, if `node` is [y | y] along the last dimension, but for dimensions of 1 and operators in `pointwise`."""
    while isinstance(node, Node):
        if is_call(node, aten.repeat.default):
            *others, last = node.args[1]
            return node.args[0] if last == 2 and set(others) <= {1} else None
        if is_call(node, aten.cat.default):
            parts = node.args[0]
            return parts[0] if _joins_last(node, 2) and parts[0] is parts[1] else None
        one_tensor = sum(isinstance(operand.meta["val"], torch.Tensor) for operand in node.all_input_nodes) == 1
        if not one_tensor or not (_keeps_rows(node) or is_call(node, *pointwise)):
            return None
        node = node.args[0]
    return None


def _keeps_rows(node: Node) -> bool:
    """Whether `node` only adds or removes dimensions before the last."""
    if is_call(node, aten.unsqueeze.default):
        return node.args[1] not in (-1, node.meta["val"].dim() - 1)
    return is_call(node, RESHAPE) and same_size(node.meta["val"].shape[-1], node.args[0].meta["val"].shape[-1])


def _computed_table(graph: Graph, rotation: _Rotation) -> tuple[Node, Node] | None:
    """(0 … T-1, this step's cos || sin), for cos and sin that hold each value twice."""
    cos, sin = rotation.cos, rotation.sin
    if _once(cos, POINTWISE) is None or _once(sin, POINTWISE) is None:
        return None
    _move_to_the_top(cos)
    _move_to_the_top(sin)
    tokens, width = (0 if cos.meta["val"].dim() == 3 else 2), rotation.rotary_dim
    with graph.inserting_before(max(cos, sin).next):
        rows = [call(graph, RESHAPE, values, [-1, width]) for values in (cos, sin)]
        halves = [call(graph, aten.slice.Tensor, values, 1, 0, width // 2) for values in rows]
        table = call(graph, aten.cat.default, halves, -1)
        count = call(graph, aten.sym_size.int, cos, tokens)
        positions = graph.call_function(aten.arange.default, (count,), {"dtype": torch.int64})
        with cos.meta["val"].fake_mode:
            positions.meta["val"] = torch.arange(count.meta["val"], dtype=torch.int64)
    return positions, table


def _move_to_the_top(node: Node) -> None:
    """Move `node` and what it is computed from before the first computation: layers that are alike then stay alike."""
    if node.op != "call_function":
        return
    needed, pending = {node}, [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand.op == "call_function" and operand not in needed:
                needed.add(operand)
                pending.append(operand)
    ours = [item for item in needed if getattr(item.target, "namespace", "") == "vllm_ms"]
    if not all(is_call(item, operator("binary")) for item in ours):
        return  # one of them may read what the model writes
    first = next(item for item in node.graph.nodes if item.op == "call_function")
    for item in sorted(needed):
        if item is first:
            first = first.next
        else:
            first.prepend(item)


def _replace(graph: Graph, rotation: _Rotation, positions: Node, table: Node) -> None:
    end, x = rotation.end, rotation.x
    heads, head_size = x.meta["val"].shape[1], x.meta["val"].shape[-1]
    batched = x.meta["val"].dim() == 4
    with graph.inserting_before(end):
        if batched:
            x = call(graph, RESHAPE, call(graph, aten.transpose.int, x, 1, 2), [-1, heads, head_size])
        values = {"positions": positions, "x": x, "cos_sin": table}
        settings = {"head_size": head_size, "rotary_dim": rotation.rotary_dim, "neox": True}
        result = create(graph, "rotary", {**values, **settings}, x.meta["val"])
        if batched:
            result = call(graph, aten.transpose.int, call(graph, RESHAPE, result, [1, -1, heads, head_size]), 1, 2)
    end.replace_all_uses_with(result)
    graph.erase_node(end)
