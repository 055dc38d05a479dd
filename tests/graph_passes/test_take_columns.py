"""Slices of columns, and parts of splits, become an operator of ours, and only those."""

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
    assert node.args[1:] == (*bounds, 1)
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


HEADS, HEAD = 2, 4
QKV = {"x": (7, 6), "weight": (HEADS * 5 * HEAD, 6)}


def split(x, weight, *, sizes=(2, 1, 2), dim=2):
    """The parts of a projection whose rows are [HEADS, 5, HEAD]."""
    return linear(x, weight).view(-1, HEADS, 5, HEAD).split(sizes, dim)


def test_parts_of_a_split_of_rows():
    matches, found, graph = run(take_columns, lambda x, weight: linear(x, weight).split([3, 2, 4], -1)[::2], **SHAPES)
    assert (matches, found) == (2, {LINEAR: 1, COLUMNS: 2})
    assert [node.args[1:] for node in graph.find_nodes(op="call_function", target=own.columns.default)] == [
        (0, 3, 1),
        (5, 9, 1),
    ]


def test_parts_of_a_split_of_each_head():
    def model(x, weight):
        q, k, v = split(x, weight)
        return q.reshape(-1, HEADS * 2 * HEAD), k, v.reshape(-1, HEADS, 2 * HEAD)

    matches, found, graph = run(take_columns, model, **QKV)
    assert matches == found[COLUMNS] == 3 and "aten.split_with_sizes.default" not in found
    assert found["aten.reshape.default"] == 2, "q is what columns gives"
    q, k, v = graph.find_nodes(op="call_function", target=own.columns.default)
    assert [node.args[1:] for node in (q, k, v)] == [(0, 8, HEADS), (8, 12, HEADS), (12, 20, HEADS)]
    assert [node.meta["val"].shape[1] for node in (q, k, v)] == [16, 8, 16]


def test_a_slice_of_each_part():
    matches, _, graph = run(take_columns, lambda x, weight: linear(x, weight).view(-1, 3, 3)[..., 1:], **SHAPES)
    assert matches == 1
    (node,) = graph.find_nodes(op="call_function", target=own.columns.default)
    assert node.args[1:] == (1, 3, 3)
    (result,) = graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    assert result.args[0] is node and result.meta["val"].shape[1:] == (3, 2)


@pytest.mark.parametrize(
    "model",
    [
        lambda x, weight: linear(x, weight).view(-1, 5, HEAD).split([2, 3], 1),
        lambda x, weight: linear(x, weight).view(-1, HEADS, 5, HEAD).transpose(1, 2).split([2, 3], 1),
        lambda x, weight: x.view(-1, 2, 3).split([1, 2], 2),
        lambda x, weight: linear(x, weight).split([3, 4], 0),
    ],
    ids=["other rows", "transposed", "not ours", "of rows"],
)
def test_other_splits_stay(model):
    matches, found, _ = run(take_columns, model, **QKV)
    assert matches == 0 and COLUMNS not in found
