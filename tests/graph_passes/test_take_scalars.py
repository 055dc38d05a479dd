"""Arithmetic with constants becomes an operator of ours after one of ours, and only there."""

import pytest

from vllm_mindspore.graph_passes import take_scalars
from vllm_mindspore.graph_passes.nodes import arguments, calls

from .graphs import linear, run

SHAPES = {"x": (7, 6), "weight": (9, 6)}
LINEAR, SCALAR = "vllm_ms.linear.default", "vllm_ms.binary_scalar.default"


@pytest.mark.parametrize(
    ("compute", "op"),
    [
        (lambda y: y * 0.22, "mul"),
        (lambda y: 0.22 * y, "mul"),
        (lambda y: y / 0.22, "div"),
        (lambda y: y + 0.22, "add"),
        (lambda y: y - 0.22, "sub"),
    ],
)
def test_a_constant_after_a_result_of_ours(compute, op):
    matches, found, graph = run(take_scalars, lambda x, weight: compute(linear(x, weight)), **SHAPES)
    assert (matches, found) == (1, {LINEAR: 1, SCALAR: 1})
    (node,) = calls(graph, "binary_scalar")
    values = arguments(node)
    assert (values["y"], values["op"]) == (0.22, op)
    assert node.meta["val"].shape[1] == 9


def test_one_after_the_other():
    matches, found, _ = run(take_scalars, lambda x, weight: linear(x, weight) * 3 + 1, **SHAPES)
    assert (matches, found) == (2, {LINEAR: 1, SCALAR: 2})


@pytest.mark.parametrize(
    "model",
    [
        lambda x, weight: x * 2.0,
        lambda x, weight: linear(x, weight) * x.shape[0],
        lambda x, weight: 1.0 - linear(x, weight),
        lambda x, weight: (linear(x, weight) > 0) * 2.0,
    ],
    ids=["not ours", "not a constant", "constant first", "not floats"],
)
def test_other_arithmetic_stays(model):
    matches, found, _ = run(take_scalars, model, **SHAPES)
    assert matches == 0 and SCALAR not in found
