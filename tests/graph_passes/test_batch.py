"""Models that carry a batch dimension of 1 end up with the same operators as models that do not."""

import pytest
import torch

from tests.compiler import networks
from vllm_mindspore.graph_passes import PASSES, PassManager, drop_batch
from vllm_mindspore.graph_passes.nodes import arguments, calls

from .graphs import captured, linear, operators, own, run


def layer(x, g, w_up, w_down, *, batched):
    """A pre-norm MLP block with its residual; x: [T, 6]."""
    if batched:
        x = x[None]
    y = own.rms_norm(x, g, 1e-6, 0.0)
    y = own.activation(flat_linear(y, w_up), "silu_and_mul")
    x = x + flat_linear(y, w_down)
    return x[0] if batched else x


def flat_linear(x, weight):
    """vLLM's linear layers in the Transformers backend work on [T, H]."""
    return linear(x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


SHAPES = dict(x=(7, 6), g=(6,), w_up=(8, 6), w_down=(6, 4))


def test_a_layer_with_a_batch_dimension_is_fused_as_one_without():
    graphs = []
    for batched in (True, False):
        graph = captured(lambda *tensors: layer(*tensors, batched=batched), **SHAPES).module.graph  # noqa: B023
        PassManager(PASSES).run(graph)
        graphs.append((operators(graph), [arguments(node)["norm"] for node in calls(graph, "linear")]))
    assert graphs[0] == graphs[1] == ({"vllm_ms.linear.default": 2}, ["rms", ""])


def test_a_split_of_rows_is_one_of_rows_without_the_batch_dimension():
    def function(x, w):
        parts = linear(x, w).view(1, -1, 4).split([1, 3], -1)
        return parts[0].view(-1, 1), parts[1].view(-1, 3)

    matches, _, graph = run(drop_batch, function, x=(7, 6), w=(4, 6))
    assert matches == 1
    assert operators(graph) == {"vllm_ms.linear.default": 1, "aten.split_with_sizes.default": 1, "getitem": 2}


def test_a_vector_is_still_added_to_every_row():
    matches, left, graph = run(drop_batch, lambda x, b: (x[None] + b)[0], x=(7, 6), b=(6,))
    assert matches == 1
    assert left == {"vllm_ms.binary.default": 1}
    assert calls(graph, "binary")[0].args[1].op == "placeholder"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: own.activation(x.view(-1, 2, 3), "relu"),
        lambda x, w: own.activation(x.unsqueeze(1), "relu"),
        lambda x, w: x[None] + w.view(3, 1, 6),
        lambda x, w: x[None].split([1], 0)[0],
        lambda x, w: torch.cumsum(x[None], 0),
    ],
    ids=["heads", "inner dimension", "a real batch", "split of the batch", "an operator over the batch"],
)
def test_other_dimensions_stay(function):
    matches, left, _ = run(drop_batch, function, x=(7, 6), w=(18,))
    assert matches == 0
    assert left


@pytest.mark.parametrize("passes", [True, False])
def test_results_are_the_same(tmp_path, passes):
    torch.manual_seed(0)
    x, g, up, down = torch.randn(7, 6), torch.randn(6), torch.randn(8, 6), torch.randn(6, 4)
    weights = {"g": g, "w_up": up, "w_down": down}
    found = networks.run(tmp_path, lambda *t, **w: layer(*t, **w, batched=True), x, weights=weights, passes=passes)
    y = torch.nn.functional.rms_norm(x, (6,), g, 1e-6) @ up.T
    wanted = x + torch.nn.functional.silu(y[:, :4]) * y[:, 4:] @ down.T
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
