"""RMS norm written as arithmetic is recognized, and nothing like it is."""

import pytest
import torch

from vllm_mindspore.graph_passes import fuse_rms_norm
from vllm_mindspore.graph_passes.nodes import arguments, calls

from .graphs import run

SHAPES = dict(x=(7, 6), weight=(6,))


def norm(x, weight, square=lambda x: x.pow(2), dim=-1, keepdim=True):
    variance = square(x).mean(dim=dim, keepdim=keepdim)
    return x * torch.rsqrt(variance + 1e-5) * weight


@pytest.mark.parametrize(
    "function",
    [
        norm,
        lambda x, weight: norm(x, weight, square=lambda x: x * x),
        lambda x, weight: weight * (torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * x.float()),
    ],
    ids=["pow", "product", "other order"],
)
def test_the_forms_of_the_norm(function):
    matches, left, graph = run(fuse_rms_norm, function, **SHAPES)
    (fused,) = (arguments(node) for node in calls(graph, "rms_norm"))
    assert matches == 1
    assert left == {"vllm_ms.rms_norm.default": 1}
    assert (fused["x"].name, fused["weight"].name, fused["eps"], fused["offset"]) == ("arg0_1", "arg1_1", 1e-5, 0.0)


def test_heads_are_normalized_each_by_itself():
    matches, left, _ = run(
        fuse_rms_norm, lambda x, weight: norm(x.view(-1, 2, 3), weight).view(-1, 6), x=(7, 6), weight=(3,)
    )
    assert matches == 1
    assert left["vllm_ms.rms_norm.default"] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: norm(x, weight, square=lambda x: x.pow(3)),
        lambda x, weight: norm(x, weight, square=lambda x: x * (x + 1)),
        lambda x, weight: norm(x, weight, dim=0),
        lambda x, weight: norm(x, weight[None].expand(7, 6)),
        lambda x, weight: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight,
        lambda x, weight: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight,
    ],
    ids=["cube", "no square", "over tokens", "weight per token", "another tensor", "square root"],
)
def test_what_is_not_the_norm_stays(function):
    assert run(fuse_rms_norm, function, **SHAPES)[0] == 0
