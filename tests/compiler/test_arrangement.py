"""Which weights are put into columns: all readers must read them so, in every graph, and no memory may be shared."""

import pytest
import torch

from tests.compiler.networks import lowered, run, to_torch
from tests.ops.helpers import current_isa
from vllm_mindspore.compiler import arrangement
from vllm_mindspore.compiler.program import Program
from vllm_mindspore.compiler.tensors import to_mindspore
from vllm_mindspore.ops import columns

EXPERTS = ("w13", "w2")
read = pytest.mark.skipif(not columns.supported(), reason="these kernels do not read columns")


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
    assert names(arrangement.chosen([(body, ["body", "head", "norm"]), (head, ["head"])])) == {"body", "head"}
    assert names(arrangement.chosen([(body, ["body", "head"]), ((), ["head"])])) == {"body"}


def test_weights_that_belong_together_stay_together():
    groups = (EXPERTS, ("shared", "w2"), ("other",))
    everything = ["w13", "w2", "shared", "other"]
    assert names(arrangement.chosen([(groups, everything)])) == set(everything)
    assert names(arrangement.chosen([(groups, everything), ((), ["shared"])])) == {"other"}


@read
def test_weights_that_belong_together_are_coded_together():
    usual, other = half(32, 64), half(32, 64) * torch.logspace(-30, 30, 64).to(torch.bfloat16)
    weights = {"w13": usual.clone(), "w2": other.clone(), "shared": usual.clone(), "one": usual.clone()}
    groups = (EXPERTS, ("shared", "w2"), ("one",))
    arranged = arrangement.arrange(groups, weights)
    assert arranged == {"w13": False, "w2": False, "shared": False, "one": True}
    arrangement.to_rows(arranged, weights)
    assert torch.equal(weights["w2"], other)
    assert all(torch.equal(weights[name], usual) for name in ("w13", "shared", "one"))


@read
def test_memory_with_two_owners_is_left_alone():
    both = half(64, 64)
    weights = {"alone": half(32, 64), "first": both[:32], "second": both[32:], "part": half(64, 64)[:32]}
    before = {name: weight.clone() for name, weight in weights.items()}
    assert arrangement.arrange(tuple((name,) for name in weights), weights) == {"alone": True}
    arrangement.to_rows({"alone": True}, weights)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@read
@pytest.mark.parametrize(("k", "coded"), [(6, False), (8, False), (64, True)])
@pytest.mark.parametrize("eager", [True, False], ids=["PyNative", "graph"])
def test_a_network_with_weights_in_columns_gives_the_same(eager, k, coded, tmp_path):
    weights, x = {"weight": half(64, k)}, torch.randn(9, k)
    emitted, _ = lowered(gated, [x], weights, passes=True)
    plain = run(tmp_path, gated, x, weights=weights, eager=eager)
    arranged = arrangement.arrange(emitted.columns, weights)
    assert arranged == {"weight": coded}
    found = run(tmp_path, gated, x, weights=weights, eager=eager, columns=arranged)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@read
@pytest.mark.parametrize("eager", [True, False], ids=["PyNative", "graph"])
def test_a_program_goes_on_with_other_values_whether_these_can_be_coded_or_not(eager, tmp_path):
    x = torch.randn(9, 64)
    weights = {"weight": half(64, 64)}
    emitted, _ = lowered(gated, [x], weights, passes=True)
    arranged = arrangement.arrange(emitted.columns, weights)
    path = tmp_path / "network.py"
    path.write_text(emitted.source)
    program = Program(emitted, path, weights, eager, arranged)
    program.compile([((None, 64), x.dtype)], lambda: None)
    spread = half(64, 64) * torch.logspace(-30, 0, 64).to(torch.bfloat16)
    for values, coded in ((half(64, 64), True), (spread, False), (half(64, 64), True), (-half(64, 64), True)):
        arrangement.to_rows(arranged, weights)
        weights["weight"].copy_(values)
        arranged = arrangement.arrange(emitted.columns, weights)
        assert arranged == {"weight": coded}
        program.weights_changed(arranged)
        found = to_torch(program([to_mindspore(x)]))
        multiplied = x.bfloat16().float() if current_isa() == "avx512" else x
        expected = torch.nn.functional.linear(multiplied, values.float())
        gate, up = expected.chunk(2, -1)
        torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=1e-3, atol=1e-3)
