"""Legalization: the captured graph in the vocabulary the passes and the lowering speak.

Before: ATen and vLLM operators as traced, functionalization wrappers, casts between float types.
After: float32 values only; linear, embedding, norms, activations and float arithmetic are `vllm_ms` operators;
mutating operators (`kv_write`) stand in program order without wrappers; copies and aliases are gone.
"""

import operator
from collections.abc import Callable

import torch
import vllm.ir.ops  # noqa: F401  defines torch.ops.vllm_ir
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves
from vllm.distributed.parallel_state import get_tp_group  # its module defines torch.ops.vllm.all_reduce and others

from vllm_mindspore.compiler.capture import CapturedGraph
from vllm_mindspore.graph_passes.nodes import arguments
from vllm_mindspore.ops.collectives import group_in_graphs

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)

# Calls a captured model leaves behind that say nothing about its values.
WITHOUT_EFFECT = (
    torch._C._set_grad_enabled,
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)

Rule = Callable[[torch.fx.Graph, Node], Node | None]
RULES: dict[object, Rule] = {}


class LegalizationError(NotImplementedError):
    """An operator of the captured graph has a form that cannot be expressed; the message shows the node."""


def rule(*targets):
    """Register a function (graph, node) → replacement node, or None to keep the node.

    A target is an operator, or the name of one that is defined only where a model is imported that uses it.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def operator_name(target: object) -> str:
    """`aten.add.Tensor`, `vllm_ms.linear.default`, or the Python function's name."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def value(node) -> object:
    """The fake value of a node (shape, dtype), or the argument itself."""
    return node.meta["val"] if isinstance(node, Node) else node


def is_float_tensor(node) -> bool:
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor) and value(node).dtype in FLOATS


def legalize(captured: CapturedGraph) -> None:
    """Rewrite `captured` in place and recompute every node's fake value."""
    graph = captured.module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in WITHOUT_EFFECT:
            graph.erase_node(node)
            continue
        rewrite = RULES.get(node.target) or RULES.get(operator_name(node.target))
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            replacement = rewrite(graph, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    propagate(captured)


def propagate(captured: CapturedGraph) -> None:
    """Recompute `meta["val"]` of every node from its inputs."""
    module: GraphModule = captured.module
    module.recompile()
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    FakeTensorProp(module, captured.fake_mode).propagate_dont_convert_inputs(*inputs)


def call(graph: torch.fx.Graph, target, *args) -> Node:
    """A call node whose fake value is computed at once, so that later rules can look at it."""
    node = graph.call_function(target, args)
    fakes = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
    mode = next((fake.fake_mode for fake in tree_leaves(fakes) if hasattr(fake, "fake_mode")), None)
    if mode is not None and not _mutates(target):
        with mode:
            node.meta["val"] = target(*fakes)
    return node


def _mutates(target) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def linear(graph, x, weight, bias=None) -> Node:
    return call(graph, torch.ops.vllm_ms.linear.default, x, weight, bias, None, None, None, "", 0.0, 0.0, "")


@rule(aten._to_copy.default, aten.to.dtype)
def _cast(graph, node):
    source = node.args[0]
    dtype = node.kwargs.get("dtype", node.args[1] if len(node.args) > 1 else None)
    dtype = torch.float32 if dtype in HALF else dtype
    if dtype is None or value(source).dtype == dtype:
        return source
    return call(graph, aten.to.dtype, source, dtype)


@rule(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
def _identity(graph, node):
    return node.args[0]


@rule(aten.view.default, aten._unsafe_view.default)
def _view(graph, node):
    """MindSpore tensors are contiguous: every view is a reshape, also of what was a strided view in PyTorch."""
    return call(graph, aten.reshape.default, *node.args)


@rule(aten.copy.default)
def _copy(graph, node):
    target, source = node.args[:2]
    if value(source).dtype != value(target).dtype:
        source = call(graph, aten.to.dtype, source, value(target).dtype)
    if value(source).shape == value(target).shape:
        return source
    return call(graph, aten.expand.default, source, list(value(target).shape))


def _weight_of_transpose(node) -> Node | None:
    if (
        isinstance(node, Node)
        and node.target in (aten.t.default, aten.transpose.int)
        and node.args[1:] in ((), (0, 1), (1, 0))
    ):
        return node.args[0]
    return None


@rule(aten.mm.default)
def _mm(graph, node):
    weight = _weight_of_transpose(node.args[1])
    return None if weight is None else linear(graph, node.args[0], weight)


@rule(aten.addmm.default)
def _addmm(graph, node):
    bias, x, transposed = node.args
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        raise LegalizationError(f"addmm with alpha or beta: {node.format_node()}")
    weight = _weight_of_transpose(transposed)
    if weight is None:
        product = call(graph, aten.mm.default, x, transposed)
        return call(graph, torch.ops.vllm_ms.binary.default, product, bias, "add")
    return linear(graph, x, weight, bias)


@rule(aten.linear.default)
def _linear(graph, node):
    return linear(graph, *node.args)


def is_widening(node) -> bool:
    """Whether a node only turns int32 indices into int64."""
    is_cast = isinstance(node, Node) and node.target in (aten.to.dtype, aten._to_copy.default)
    return is_cast and value(node).dtype == torch.int64 and value(node.args[0]).dtype == torch.int32


@rule(aten.embedding.default)
def _embedding(graph, node):
    weight, ids = node.args[:2]
    if is_widening(ids):  # the operator reads int32 as well
        ids = ids.args[0]
    if value(ids).dim() == 1:
        return call(graph, torch.ops.vllm_ms.embedding.default, ids, weight)
    flat = call(graph, aten.reshape.default, ids, [-1])
    rows = call(graph, torch.ops.vllm_ms.embedding.default, flat, weight)
    return call(graph, aten.reshape.default, rows, [*_sizes(graph, ids), value(weight).shape[1]])


def _collective(name: str) -> Rule:
    """vLLM names a group "tp:0": the number counts the engines of a process, and is none of the graph's business."""

    def rewrite(graph, node):
        target = getattr(torch.ops.vllm_ms, name).default
        values = arguments(node)
        group = group_in_graphs(values["group_name"])
        if name == "all_reduce":
            return call(graph, target, values["tensor"], group)
        dim = values["dim"] % value(values["tensor"]).dim()
        return call(graph, target, values["tensor"], dim, values["world_size"], group)

    return rewrite


def _sizes(graph, node) -> list:
    """The sizes of a tensor: an integer where known, else a node that computes it."""
    return [
        size if isinstance(size, int) else call(graph, aten.sym_size.int, node, dim)
        for dim, size in enumerate(value(node).shape)
    ]


def _norm_weight(weight) -> tuple[Node | None, float]:
    """`weight + constant` (Gemma) → weight and the constant."""
    if isinstance(weight, Node) and weight.target in (aten.add.Tensor, aten.add.Scalar):
        base, offset = weight.args[:2]
        if isinstance(offset, (int, float)) and not weight.kwargs:
            return base, float(offset)
    return weight, 0.0


@rule(torch.ops.vllm_ir.rms_norm.default)
def _rms_norm(graph, node):
    x, weight, epsilon, variance_size = (*node.args, None)[:4]
    if variance_size is not None:
        raise LegalizationError(f"rms_norm over part of a row (variance_size={variance_size}): {node.format_node()}")
    return call(graph, torch.ops.vllm_ms.rms_norm.default, x, *_interleave(weight, epsilon))


def _interleave(weight, epsilon):
    weight, offset = _norm_weight(weight)
    return weight, epsilon, offset


@rule(torch.ops.vllm_ir.fused_add_rms_norm.default)
def _fused_add_rms_norm(graph, node):
    _replace_add_norm(graph, node, *(*node.args, None)[:5])


def _replace_add_norm(graph, node, x, residual, weight, epsilon, variance_size):
    if variance_size is not None:
        raise LegalizationError(f"rms_norm over part of a row (variance_size={variance_size}): {node.format_node()}")
    total = call(graph, torch.ops.vllm_ms.binary.default, x, residual, "add")
    norm = call(graph, torch.ops.vllm_ms.rms_norm.default, total, *_interleave(weight, epsilon))
    _replace_results(graph, node, [norm, total])


def _replace_results(graph, node, results: list[Node | None]) -> None:
    for user in list(node.users):
        if user.target is not operator.getitem or user.args[1] >= len(results) or results[user.args[1]] is None:
            raise LegalizationError(
                f"unexpected use of a multi-result operator: {user.format_node()} of {node.format_node()}"
            )
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)


@rule(torch.ops.higher_order.auto_functionalized_v2)
def _auto_functionalized(graph, node):
    target, arguments = node.args[0], _original_arguments(node)
    if target is torch.ops.vllm_ir.fused_add_rms_norm.maybe_inplace:
        _replace_add_norm(
            graph,
            node,
            *(arguments[name] for name in ("x", "x_residual", "weight", "epsilon")),
            arguments.get("variance_size"),
        )
        return None
    schema = target._schema
    inner = graph.call_function(target, tuple(arguments[argument.name] for argument in schema.arguments))
    if len(schema.returns) == 1:
        with value(node.kwargs["_all_bases"][0]).fake_mode:
            inner.meta["val"] = value(node)[0] if "val" in node.meta else None
    mutated = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    bases = node.kwargs["_all_bases"]
    results = [inner if schema.returns else None, *bases]
    if len(schema.returns) > 1:
        raise LegalizationError(f"mutating operator with several results: {operator_name(target)} ({mutated})")
    _replace_results(graph, node, results)
    return None


def _original_arguments(node: Node) -> dict[str, object]:
    """The wrapped operator's arguments, with each mutated one replaced by the tensor it is."""
    arguments, views = {}, []
    bases = node.kwargs["_all_bases"]
    for name, argument in node.kwargs.items():
        if name == "_all_bases":
            continue
        if name.startswith("_") and name.endswith("_base_index"):
            arguments[name[1 : -len("_base_index")]] = None if argument is None else bases[argument]
        elif name.startswith("_") and not name.endswith("_alias"):
            views.append(name)
        elif not name.startswith("_"):
            arguments[name] = argument
    if views:
        raise LegalizationError(f"operator that mutates a view of a tensor ({views}): {node.format_node()}")
    return arguments


@rule(aten.layer_norm.default, aten.native_layer_norm.default)
def _layer_norm(graph, node):
    x, shape, weight, bias, epsilon = (*node.args, None, None, 1e-5)[:5] if len(node.args) < 5 else node.args[:5]
    if len(shape) != 1:
        raise LegalizationError(f"layer_norm over {len(shape)} dimensions: {node.format_node()}")
    norm = call(graph, torch.ops.vllm_ms.layer_norm.default, x, weight, bias, epsilon)
    if node.target is aten.layer_norm.default:
        return norm
    _replace_results(graph, node, [norm, None, None])
    return None


def _activation(name: str) -> Rule:
    def rewrite(graph, node):
        return (
            call(graph, torch.ops.vllm_ms.activation.default, node.args[0], name)
            if is_float_tensor(node.args[0])
            else None
        )

    return rewrite


@rule("vllm.minimax_qk_norm_fusion.default")
def _norm_of_all_ranks(graph, node):
    """MiniMax's norms of query and key, each over the heads of all ranks: one sum of squares for both."""
    qkv, q_weight, k_weight, q_size, kv_size, _, ranks, epsilon, _ = node.args
    parts = [
        call(graph, aten.slice.Tensor, qkv, 1, begin, end) for begin, end in ((0, q_size), (q_size, q_size + kv_size))
    ]
    squares = [call(graph, aten.mean.dim, call(graph, aten.pow.Tensor_Scalar, part, 2), [-1], True) for part in parts]
    group = group_in_graphs(get_tp_group().unique_name)
    sums = call(graph, torch.ops.vllm_ms.all_reduce.default, call(graph, aten.cat.default, squares, 1), group)
    means = call(graph, aten.add.Scalar, call(graph, aten.div.Scalar, sums, ranks), epsilon)
    factors = call(graph, aten.rsqrt.default, means)
    results = []
    for i, (part, weight) in enumerate(zip(parts, (q_weight, k_weight), strict=True)):
        normed = call(
            graph, torch.ops.vllm_ms.binary.default, part, call(graph, aten.slice.Tensor, factors, 1, i, i + 1), "mul"
        )
        results.append(call(graph, torch.ops.vllm_ms.binary.default, normed, weight, "mul"))
    _replace_results(graph, node, results)


RULES[torch.ops.vllm.all_reduce.default] = _collective("all_reduce")
RULES[torch.ops.vllm.all_gather.default] = _collective("all_gather")
RULES[torch.ops.vllm.reduce_scatter.default] = _collective("reduce_scatter")
RULES[aten.relu.default] = _activation("relu")
RULES[aten.silu.default] = _activation("silu")
RULES[aten.sigmoid.default] = _activation("sigmoid")


@rule(aten.gelu.default)
def _gelu(graph, node):
    name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return call(graph, torch.ops.vllm_ms.activation.default, node.args[0], name)


def _arithmetic(name: str) -> Rule:
    """Float tensor ∘ tensor → our operator: MindSpore's broadcasting arithmetic keeps memory for ever (facts, §8)."""

    def rewrite(graph, node):
        x, y = node.args[:2]
        if not (is_float_tensor(x) and is_float_tensor(y)):
            return None
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            y = call(graph, aten.mul.Scalar, y, alpha)
        return call(graph, torch.ops.vllm_ms.binary.default, x, y, name)

    return rewrite


for _name in ("add", "sub", "mul", "div"):
    RULES[getattr(aten, _name).Tensor] = _arithmetic(_name)
for _name in ("maximum", "minimum"):
    RULES[getattr(aten, _name).default] = _arithmetic(_name)


@rule(
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
def _factory(graph, node):
    if node.kwargs.get("dtype") not in HALF:
        return None
    return call_with_kwargs(graph, node, {**node.kwargs, "dtype": torch.float32})


def call_with_kwargs(graph, node: Node, kwargs: dict) -> Node:
    replacement = graph.call_function(node.target, node.args, kwargs)
    replacement.meta = dict(node.meta)
    replacement.meta["val"] = value(node).to(torch.float32)
    return replacement
