"""What drafts have before their layer: ids masked instead of rows, and two results side by side in one operator."""

import pytest
import torch

from vllm_mindspore.graph_passes import mask_ids, take_concat

from .graphs import linear, own, run

LOOKUP = {"ids": (7,), "positions": (7,), "table": (11, 6)}
WHERE, FILL = "aten.where.self", "aten.masked_fill.Scalar"


def masked(ids, positions, table, through=lambda rows: rows):
    rows = through(own.embedding(ids.to(torch.int64), table))
    return torch.where(positions.unsqueeze(-1) == 0, 0, rows)


def test_assignments_to_rows_are_choices_too():
    def model(ids, positions, table):
        rows = own.embedding(ids.to(torch.int64), table)
        rows[positions == 0] = 0
        return rows * 2

    matches, found, _ = run(mask_ids, model, **LOOKUP)
    assert matches == 1 and "aten.index_put.default" not in found and found[FILL] == 1


def read_elsewhere(ids, positions, table):
    rows = own.embedding(ids.to(torch.int64), table)
    return torch.where(positions.unsqueeze(-1) == 0, 0, rows) + rows


@pytest.mark.parametrize("through", [lambda rows: rows, lambda rows: own.all_reduce(rows, "tp")], ids=["one", "ranks"])
def test_ids_are_masked_instead_of_rows(through):
    matches, found, graph = run(mask_ids, lambda *tensors: masked(*tensors, through), **LOOKUP)
    assert matches == 1 and WHERE not in found and found[FILL] == 1
    (lookup,) = graph.find_nodes(op="call_function", target=own.embedding.default)
    assert lookup.args[0].args[2] == -1


@pytest.mark.parametrize(
    "model",
    [
        lambda ids, positions, table: torch.where(positions.unsqueeze(-1) == 0, 1, own.embedding(ids.long(), table)),
        lambda ids, positions, table: torch.where(positions.unsqueeze(-1) > 0, 0, own.embedding(ids.long(), table)),
        read_elsewhere,
        lambda ids, positions, table: masked(ids, positions, table, lambda rows: rows * 2),
    ],
    ids=["not zero", "another comparison", "read elsewhere", "not the embedding"],
)
def test_other_choices_stay(model):
    matches, found, _ = run(mask_ids, model, **LOOKUP)
    assert (matches, found[WHERE]) == (0, 1)


SHAPES = {"x": (7, 6), "y": (7, 5), "weight": (9, 6)}
CONCAT, CAT = "vllm_ms.concat.default", "aten.cat.default"


@pytest.mark.parametrize("dim", [-1, 1])
def test_results_side_by_side(dim):
    matches, found, _ = run(take_concat, lambda x, y, weight: torch.cat([linear(x, weight), y], dim), **SHAPES)
    assert (matches, found) == (1, {"vllm_ms.linear.default": 1, CONCAT: 1})


@pytest.mark.parametrize(
    "model",
    [
        lambda x, y, weight: torch.cat([linear(x, weight), linear(x, weight)], 0),
        lambda x, y, weight: torch.cat([linear(x, weight), y, y], 1),
        lambda x, y, weight: torch.cat([x, y], 1),
    ],
    ids=["rows", "three", "not ours"],
)
def test_other_concatenations_stay(model):
    matches, found, _ = run(take_concat, model, **SHAPES)
    assert matches == 0 and found[CAT] == 1
