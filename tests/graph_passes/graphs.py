"""Small FX graphs of our operators, made from Python functions, and what they consist of."""

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_mindspore.compiler.capture import Capture, CapturedGraph
from vllm_mindspore.compiler.legalize import legalize, operator_name
from vllm_mindspore.ops import registry

registry.define_all()
own = torch.ops.vllm_ms


def captured(function, **shapes: tuple[int, ...]) -> CapturedGraph:
    """`function` of tensors with the given shapes, captured and legalized; a first size of 7 is symbolic.

    Tensors are float32, `positions` int64.
    """
    capture = Capture("test")
    for name, shape in shapes.items():
        kind = "tensor" if 7 in shape else "weight"
        dtype = torch.int64 if name == "positions" else torch.float32
        capture.add_input(kind, name, shape, dtype, dynamic=(0,) if kind == "tensor" else ())
    graph = capture.trace(lambda tensors: function(*tensors))
    legalize(graph)
    return graph


def operators(graph: torch.fx.Graph) -> dict[str, int]:
    """How often each operator occurs."""
    return dict(Counter(operator_name(node.target) for node in graph.nodes if node.op == "call_function"))


def run(graph_pass, function, **shapes):
    """(matches, operators afterwards, graph) of one pass on one function."""
    graph = captured(function, **shapes).module.graph
    matches = graph_pass.run(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return matches, operators(graph), graph


def traced(function, *tensors: torch.Tensor) -> torch.fx.Graph:
    """`function` of tensors of exactly these shapes and types as an FX graph, not legalized."""
    with FakeTensorMode() as mode:
        return make_fx(function)(*(mode.from_tensor(tensor) for tensor in tensors)).graph


def linear(x, weight, bias=None, residual=None, activation=""):
    """An unfused linear, as legalization writes it."""
    return own.linear(x, weight, bias, residual, None, None, "", 0.0, 0.0, activation)


def route(logits):
    """One expert a token."""
    return own.moe_route(logits, None, None, 1, "softmax", True, 1, 1, False, 1.5)


def experts(x, logits, w13, w2, weight_on_input=False):
    """A layer of experts with one expert a token."""
    return routed(x, route(logits), w13, w2, weight_on_input)


def routed(x, routing, w13, w2, weight_on_input=False):
    """What such a layer does after its router, as the capture writes it."""
    absent, activation = [None] * 5, ("silu_and_mul", False, 1.0, 0.0, 0.0)
    return own.moe_experts(x, routing, w13, w2, *absent, "", 0.0, 0.0, *activation, weight_on_input)
