"""Rows are selected before the operators that treat each row by itself, and the same numbers come out."""

import torch

from vllm_mindspore.graph_passes import select_rows

from .graphs import captured, linear, operators, own, route, routed, run

SHAPES = {"x": (7, 6), "positions": (7,), "weight": (9, 6), "back": (6, 9)}
GATHER, LINEAR, NORM = "vllm_ms.embedding.default", "vllm_ms.linear.default", "vllm_ms.rms_norm.default"


def block(x, rows, weight, back):
    """A residual stream read twice, as the last layer's."""
    up = linear(own.rms_norm(x, None, 1e-6, 0.0), weight, activation="silu")
    return own.embedding(rows, linear(up, back, residual=x))


def test_a_selection_moves_to_where_the_rows_come_from():
    matches, found, graph = run(select_rows, block, **SHAPES)
    assert matches == 3
    assert found == {GATHER: 1, LINEAR: 2, NORM: 1}, "one selection of x serves the norm and the residual"
    first = next(node for node in graph.nodes if node.op == "call_function")
    assert first.target is own.embedding.default


def test_what_is_used_elsewhere_is_computed_for_all_rows():
    def model(x, rows, weight, back):
        up = linear(x, weight)
        return own.embedding(rows, linear(up, back)), up

    matches, found, _ = run(select_rows, model, **SHAPES)
    assert (matches, found) == (1, {GATHER: 1, LINEAR: 2})


def test_a_table_of_weights_stays_a_table():
    matches, found, _ = run(select_rows, lambda x, rows, weight, back: own.embedding(rows, weight), **SHAPES)
    assert (matches, found) == (0, {GATHER: 1})


def test_selections_of_other_rows_are_not_mixed_up():
    def model(x, rows, weight, back):
        y = own.rms_norm(x, None, 1e-6, 0.0)
        return own.embedding(rows, y) + own.embedding(torch.flip(rows, (0,)), y)

    graph = captured(model, **SHAPES).module.graph
    assert select_rows.run(graph) == 0
    assert operators(graph)[NORM] == 1


def test_experts_compute_and_count_the_selected_rows():
    def model(x, rows, logits, w13, w2):
        routing = route(logits)
        return own.embedding(rows, routed(x, routing, w13, w2)), own.moe_count(routing, 3)

    shapes = {"x": (7, 6), "positions": (7,), "logits": (7, 3), "w13": (3, 8, 6), "w2": (3, 6, 4)}
    matches, found, graph = run(select_rows, model, **shapes)
    assert matches == 2
    assert found == {GATHER: 2, **{f"vllm_ms.moe_{name}.default": 1 for name in ("route", "experts", "count")}}
    (count,) = graph.find_nodes(op="call_function", target=own.moe_count.default)
    assert count.args[0].args[0].target is own.embedding.default, "tokens that are not selected do not count"
