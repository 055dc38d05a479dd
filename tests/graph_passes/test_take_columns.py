"""Slices of columns become an operator of ours, and only those."""

import pytest
import torch

from vllm_mindspore.graph_passes import take_columns

from .graphs import linear, own, run

SHAPES = {"x": (7, 6), "weight": (9, 6)}
COLUMNS, LINEAR = "vllm_ms.columns.default", "vllm_ms.linear.default"


@pytest.mark.parametrize(
    ("cut", "bounds"),
    [
        (lambda y: y[..., :5], (0, 5)),
        (lambda y: y[..., 2:], (2, 9)),
        (lambda y: y[..., -4:-1], (5, 8)),
        (lambda y: y.narrow(1, 3, 4), (3, 7)),
    ],
)
def test_columns_of_our_result(cut, bounds):
    matches, found, graph = run(take_columns, lambda x, weight: cut(linear(x, weight)), **SHAPES)
    assert (matches, found) == (1, {LINEAR: 1, COLUMNS: 1})
    (node,) = graph.find_nodes(op="call_function", target=own.columns.default)
    assert node.args[1:] == bounds
    assert node.meta["val"].shape[-1] == bounds[1] - bounds[0]


@pytest.mark.parametrize(
    "model",
    [
        lambda x, weight: linear(x, weight)[:3],
        lambda x, weight: linear(x, weight)[..., ::2],
        lambda x, weight: x[..., :3],
        lambda x, weight: linear(x, weight)[..., 4:4],
    ],
    ids=["rows", "every other", "not ours", "nothing"],
)
def test_other_slices_stay(model):
    matches, found, _ = run(take_columns, model, **SHAPES)
    assert matches == 0 and COLUMNS not in found


def test_of_a_leading_dimension():
    matches, found, _ = run(
        take_columns, lambda x, weight: torch.reshape(linear(x, weight), (-1, 3, 3))[:, :2], **SHAPES
    )
    assert matches == 0 and COLUMNS not in found
