"""What follows a layer of experts is written by it, and what only looks like it stays."""

import pytest

from vllm_mindspore.graph_passes import fuse_moe, fuse_norm, fuse_residual
from vllm_mindspore.graph_passes.nodes import arguments, calls

from .graphs import experts, linear, own, route, routed, run

SHAPES = {"x": (7, 6), "logits": (7, 3), "w13": (3, 8, 6), "w2": (3, 6, 4), "y": (7, 6)}
MOE = {"vllm_ms.moe_route.default": 1, "vllm_ms.moe_experts.default": 1}


def test_a_residual_is_added_by_the_experts():
    for function in (
        lambda x, logits, w13, w2, y: experts(x, logits, w13, w2) + y,
        lambda x, logits, w13, w2, y: y + experts(x, logits, w13, w2),
    ):
        matches, left, graph = run(fuse_moe, function, **SHAPES)
        assert matches == 1 and left == MOE
        assert arguments(calls(graph, "moe_experts")[0])["residual"].name == "arg4_1"


def test_a_factor_goes_into_the_weights_of_routing():
    matches, left, graph = run(fuse_moe, lambda x, logits, w13, w2, y: experts(x, logits, w13, w2) * 3.0 + y, **SHAPES)
    assert matches == 2 and left == MOE
    assert arguments(calls(graph, "moe_route")[0])["scale"] == 4.5


def test_a_factor_goes_into_the_weights_of_routing_that_is_counted_too():
    def function(x, logits, w13, w2, y):
        routing = route(logits)
        return routed(x, routing, w13, w2) * 3.0, own.moe_count(routing, 3)

    matches, left, graph = run(fuse_moe, function, **SHAPES)
    assert matches == 1 and left == {**MOE, "vllm_ms.moe_count.default": 1}
    assert arguments(calls(graph, "moe_route")[0])["scale"] == 4.5


def test_a_shared_expert_and_the_residual_take_one_sum_each():
    def function(x, logits, w13, w2, y, w):
        return (linear(x, w) + experts(x, logits, w13, w2)) + y

    matches, left, graph = run(fuse_moe, function, **SHAPES, w=(6, 6))
    assert matches == 1 and left["vllm_ms.binary.default"] == 1
    assert arguments(calls(graph, "moe_experts")[0])["residual"].name == "arg4_1"
    assert fuse_residual.run(graph) == 1
    assert not calls(graph, "binary")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, logits, w13, w2, y: (z := experts(x, logits, w13, w2)) + z,
        lambda x, logits, w13, w2, y: ((z := experts(x, logits, w13, w2)) + y, z * 2.0),
        lambda x, logits, w13, w2, y: experts(x, logits, w13, w2) + y[:1],
        lambda x, logits, w13, w2, y: experts(x, logits, w13, w2) - y,
        lambda x, logits, w13, w2, y: experts(x, logits, w13, w2, weight_on_input=True) * 2.0,
    ],
    ids=["doubled", "used twice", "broadcast", "subtraction", "a factor before the activation"],
)
def test_what_experts_cannot_write_stays(function):
    assert run(fuse_moe, function, **SHAPES)[0] == 0


def test_a_norm_is_computed_by_the_router_and_the_experts():
    def function(x, gate, w13, w2, g):
        normed = own.rms_norm(x, g, 1e-6, 1.0)
        return experts(normed, linear(normed, gate), w13, w2)

    shapes = {"x": (7, 6), "gate": (3, 6), "w13": (3, 8, 6), "w2": (3, 6, 4), "g": (6,)}
    matches, left, graph = run(fuse_norm, function, **shapes)
    assert matches == 1 and left == {**MOE, "vllm_ms.linear.default": 1}
    values = arguments(calls(graph, "moe_experts")[0])
    assert (values["norm"], values["eps"], values["norm_offset"]) == ("rms", 1e-6, 1.0)
