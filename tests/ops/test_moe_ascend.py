"""The Ascend implementations of mixtures of experts pass MindSpore's inference; routing is also run here."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops.helpers import tensor
from tests.ops.test_ascend_export import export, in_scratch_folder, ones  # noqa: F401  a fixture
from vllm_mindspore.ops import registry

PLAIN = dict(num_expert_group=1, topk_group=1, balanced=False)
EXPERTS = dict(norm="", eps=1e-6, norm_offset=0.0, activation="silu_and_mul", interleaved=False, alpha=1.0, beta=0.0,
               limit=0.0, weight_on_input=False)  # fmt: skip


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(PLAIN, scoring="softmax", renormalize=True, scale=1.0),
        dict(num_expert_group=4, topk_group=2, balanced=False, scoring="sigmoid", renormalize=True, scale=2.5),
        dict(num_expert_group=6, topk_group=3, balanced=False, scoring="softmax", renormalize=False, scale=16.0),
        dict(num_expert_group=6, topk_group=6, balanced=True, scoring="softmax", renormalize=False, scale=1.0),
        dict(num_expert_group=4, topk_group=3, balanced=True, scoring="sigmoid", renormalize=True, scale=1.5),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_routing_also_runs(options, biased, scaled):
    random = np.random.default_rng(4)
    inputs = [tensor(random.standard_normal((9, 24)))]
    given = tuple(name for name, present in (("bias", biased), ("expert_scale", scaled)) if present)
    inputs += [tensor(random.standard_normal(24)) for _ in given]
    top_k = 6 if options["balanced"] else 5
    op = registry.build("moe_route", "ascend", given, top_k=top_k, **options)
    assert "TopK" in export(op, *inputs)
    expected = registry.build("moe_route", "cpu", given, top_k=top_k, **options)(*inputs).asnumpy()
    np.testing.assert_allclose(op(*inputs).asnumpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("changed", "present"),
    [
        ({}, ()),
        (dict(norm="rms"), ("residual", "norm_weight")),
        (dict(activation="clamped_silu_and_mul", interleaved=True, limit=7.0), ("w13_bias", "w2_bias", "residual")),
        (dict(activation="gelu_and_mul", norm="layer"), ("norm_weight", "norm_bias")),
    ],
)
def test_experts(changed, present, dtype):
    op = registry.build("moe_experts", "ascend", present, **{**EXPERTS, **changed})
    shapes = {"w13_bias": (6, 8), "w2_bias": (6, 10), "residual": (5, 10), "norm_weight": (12,), "norm_bias": (12,)}
    routing = ms.Tensor(np.array([[0, 3, 0.5, 0.5]] * 5, np.float32))
    inputs = [ones(5, 12), routing, ones(6, 8, 12, dtype=dtype), ones(6, 10, 4, dtype=dtype)]
    inputs += [
        ones(*shapes[name], dtype="float32" if name == "residual" else dtype) for name in shapes if name in present
    ]
    graph = export(op, *inputs)
    assert {"GroupedMatmul", "Sort"} <= graph


def test_counting_and_placing_also_run():
    ids = np.array([[0, 3, 1], [-1, 2, 3], [4, 4, 0], [1, -1, -1]], np.float32)
    routing = tensor(np.concatenate([ids, np.full_like(ids, 0.25)], 1))
    expert_map = tensor(np.array([[4, -1], [3, 7], [2, -1], [1, 6], [0, -1]], np.int32))
    for name, inputs, attributes in (
        ("moe_count", (routing,), dict(experts=5)),
        ("moe_place", (routing, expert_map), {}),
        ("moe_local", (routing,), dict(first=1, count=3)),
    ):
        op = registry.build(name, "ascend", (), **attributes)
        export(op, *inputs)
        assert np.array_equal(op(*inputs).asnumpy(), registry.build(name, "cpu", (), **attributes)(*inputs).asnumpy())


def test_exchanges_take_the_sizes_of_a_step():
    x, routing, every = ones(2, 8), ones(2, 4), ones(5, 4)
    token_ranks = ms.Tensor(np.array([0, 0, 1, 1, 1], np.int32))
    group, holders = dict(rank=0, size=2, group="dp"), dict(capacity=3, columns=1, column=0)
    for name, primitive, tensors, attributes in (
        ("gather_rows_start", "AllGatherV", (routing, token_ranks), {}),
        ("moe_dispatch_start", "AllGatherV", (x, token_ranks), {}),
        ("moe_combine_start", "ReduceScatterV", (ones(5, 8), every, token_ranks), holders),
    ):
        assert primitive in export(registry.build(name, "ascend", (), **attributes, **group), *tensors)
    for name, tensors, attributes in (
        ("gather_rows_wait", (every, routing, token_ranks), {}),
        ("moe_dispatch_wait", (ones(5, 8), x, every, token_ranks), holders),
        ("moe_combine_wait", (x, ones(5, 8), every, token_ranks, routing), holders),
    ):
        export(registry.build(name, "ascend", (), **attributes, **group), *tensors)


def test_experts_weights_of_another_width_are_refused():
    op = registry.build("moe_experts", "ascend", (), **EXPERTS)
    with pytest.raises((ValueError, RuntimeError)):
        export(op, ones(5, 12), ones(5, 4), ones(6, 8, 11), ones(6, 10, 4))
