"""Which weights are put into columns: all readers must read them so, in every graph, and no memory may be shared."""

import pytest
import torch

from tests.compiler.networks import lowered, run
from vllm_mindspore.compiler import arrangement
from vllm_mindspore.ops import columns

EXPERTS = ("w13", "w2")


def names(groups) -> set[str]:
    return {name for group in groups for name in group}


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "found"),
    [(half(9, 6), {"weight"}), (half(9, 7), set()), (torch.randn(9, 6), set()), (half(9, 6).half(), set())],
    ids=["pairs of bf16", "no pairs", "float32", "float16"],
)
def test_weights_of_linear_layers(weight, found):
    emitted, _ = lowered(torch.nn.functional.linear, [torch.randn(5, weight.shape[1])], {"weight": weight}, passes=True)
    assert names(emitted.columns) == found


def gated(x, weight):
    return torch.ops.vllm_ms.activation(torch.nn.functional.linear(x, weight), "silu_and_mul")


@pytest.mark.parametrize(("rows", "found"), [(64, {"weight"}), (48, set())])
def test_gate_and_up_must_not_share_a_group_of_rows(rows, found):
    emitted, _ = lowered(gated, [torch.randn(5, 6)], {"weight": half(rows, 6)}, passes=True)
    assert "silu_and_mul" in emitted.source
    assert names(emitted.columns) == found


def test_a_reader_that_cannot_keeps_a_weight_as_it_is():
    def model(x, weight, other):
        return torch.nn.functional.linear(x, weight) + weight[:, 0], torch.nn.functional.linear(x, other)

    weights = {"weight": half(6, 6), "other": half(6, 6)}
    emitted, _ = lowered(model, [torch.randn(5, 6)], weights, passes=True)
    assert "weight" not in names(emitted.columns)


def test_every_graph_must_agree():
    head, body = (("head",),), (("body",), ("head",))
    assert arrangement.chosen([(body, ["body", "head", "norm"]), (head, ["head"])]) == {"body", "head"}
    assert arrangement.chosen([(body, ["body", "head"]), ((), ["head"])]) == {"body"}


def test_weights_that_belong_together_stay_together():
    groups = (EXPERTS, ("shared", "w2"), ("other",))
    assert arrangement.chosen([(groups, ["w13", "w2", "shared", "other"])]) == {"w13", "w2", "shared", "other"}
    assert arrangement.chosen([(groups, ["w13", "w2", "shared", "other"]), ((), ["shared"])]) == {"other"}


@pytest.mark.skipif(not columns.supported(), reason="these kernels do not read columns")
def test_memory_with_two_owners_is_left_alone():
    both = half(64, 8)
    weights = {"alone": half(32, 8), "first": both[:32], "second": both[32:], "part": half(64, 8)[:32]}
    before = {name: weight.clone() for name, weight in weights.items()}
    assert arrangement.arrange(set(weights), weights) == {"alone"}
    columns.arrange(before["alone"])
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.skipif(not columns.supported(), reason="these kernels do not read columns")
@pytest.mark.parametrize("eager", [True, False], ids=["PyNative", "graph"])
def test_a_network_with_weights_in_columns_gives_the_same(eager, tmp_path):
    weights, x = {"weight": half(64, 6)}, torch.randn(9, 6)
    emitted, _ = lowered(gated, [x], weights, passes=True)
    plain = run(tmp_path, gated, x, weights=weights, eager=eager)
    arranged = arrangement.arrange(names(emitted.columns), weights)
    assert arranged == {"weight"}
    found = run(tmp_path, gated, x, weights=weights, eager=eager, columns=arranged)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
