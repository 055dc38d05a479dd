"""moe_route on CPU through MindSpore: right against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.ops.helpers import DTYPES, stored, tensor
from vllm_mindspore.ops import registry

ROUTE = {"scoring": "softmax", "renormalize": True, "num_expert_group": 1, "topk_group": 1, "balanced": False,
         "scale": 1.0}  # fmt: skip


def route(logits, top_k, bias=None, expert_scale=None, **attributes) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, top_k], weights [T, top_k]) of the operator."""
    given = {name: value for name, value in (("bias", bias), ("expert_scale", expert_scale)) if value is not None}
    op = registry.build("moe_route", "cpu", tuple(given), top_k=top_k, **{**ROUTE, **attributes})
    found = op(tensor(logits), *map(tensor, given.values())).asnumpy()
    assert found.shape == (len(logits), 2 * top_k)
    return found[:, :top_k].astype(np.int64), found[:, top_k:]


def routing_of(
    logits, top_k, bias=None, expert_scale=None, *, scoring, renormalize, num_expert_group, topk_group, balanced, scale
):
    """The same in float64, written with sorting."""
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    scores = exponentials / exponentials.sum(-1, keepdims=True) if scoring == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores if bias is None else scores + np.asarray(bias, np.float64)
    groups = choice.reshape(len(logits), num_expert_group, -1)
    worth = groups.max(-1) if bias is None else np.sort(groups, -1)[..., -2:].sum(-1)
    order = np.argsort(-worth, axis=-1, kind="stable")
    masked = np.full_like(groups, -np.inf)
    for row, best in enumerate(order[:, :topk_group]):
        masked[row, best] = groups[row, best]
        for group in best if balanced else ():
            others = np.argsort(-groups[row, group], kind="stable")[top_k // topk_group :]
            masked[row, group, others] = -np.inf
    ids = np.argsort(-masked.reshape(choice.shape), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    if expert_scale is not None:
        weights = weights * np.asarray(expert_scale, np.float64)[ids]
    return ids, weights * scale


ROUTINGS = {
    "mixtral": dict(experts=8, top_k=2),
    "one expert": dict(experts=1, top_k=1),
    "all experts": dict(experts=7, top_k=7),
    "qwen3": dict(experts=128, top_k=8),
    "olmoe": dict(experts=64, top_k=8, renormalize=False),
    "llama4": dict(experts=16, top_k=1, scoring="sigmoid", renormalize=False),
    "deepseek-v2": dict(experts=160, top_k=6, renormalize=False, num_expert_group=8, topk_group=3, scale=16.0),
    "deepseek-v3": dict(
        experts=256, top_k=8, scoring="sigmoid", bias=True, num_expert_group=8, topk_group=4, scale=2.5
    ),
    "glm4": dict(experts=10, top_k=3, scoring="sigmoid", bias=True, scale=1.7),
    "ernie": dict(experts=33, top_k=6, bias=True),
    "odd groups": dict(experts=33, top_k=5, num_expert_group=11, topk_group=2),
    "pangu-pro": dict(
        experts=64, top_k=8, renormalize=False, num_expert_group=8, topk_group=8, balanced=True, expert_scale=True
    ),
    "several of each": dict(experts=35, top_k=15, num_expert_group=5, topk_group=5, balanced=True, expert_scale=True),
    "groups of one": dict(experts=13, top_k=13, num_expert_group=13, topk_group=13, balanced=True, scale=1.5),
    "one group": dict(experts=19, top_k=4, balanced=True, scoring="sigmoid", bias=True, expert_scale=True),
    "best groups, balanced": dict(
        experts=42, top_k=6, num_expert_group=6, topk_group=3, balanced=True, scoring="sigmoid", bias=True, scale=2.5
    ),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_is_right(name):
    options = dict(ROUTINGS[name])
    experts, top_k, biased = options.pop("experts"), options.pop("top_k"), options.pop("bias", False)
    scaled = options.pop("expert_scale", False)
    rng = np.random.default_rng(len(name))
    bias = rng.standard_normal(experts).astype(np.float32) if biased else None
    expert_scale = (rng.random(experts) + 0.5).astype(np.float32) if scaled else None
    for rows in (0, 1, 2, 33, 300):
        logits = 2 * rng.standard_normal((rows, experts)).astype(np.float32)
        ids, weights = route(logits, top_k, bias, expert_scale, **options)
        if not rows:
            continue
        expected_ids, expected = routing_of(logits, top_k, bias, expert_scale, **{**ROUTE, **options})
        assert np.array_equal(ids, expected_ids)
        assert np.abs(weights / expected - 1).max() < 2e-6


@pytest.mark.parametrize("per_group", [1, 3])
def test_every_group_gives_as_many_experts(per_group):
    logits = 4 * np.random.default_rng(per_group).standard_normal((50, 30)).astype(np.float32)
    logits[:, :5] += 20  # without groups, all would be chosen from the first
    ids, _ = route(logits, 6 * per_group, num_expert_group=6, topk_group=6, balanced=True)
    assert [np.bincount(row // 5, minlength=6).tolist() for row in ids] == [[per_group] * 6] * 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_experts_are_read_in_the_type_they_are_stored_in(dtype):
    logits = np.random.default_rng(0).standard_normal((9, 21)).astype(np.float32)
    scale = np.random.default_rng(1).random(21) + 0.5
    op = registry.build("moe_route", "cpu", ("expert_scale",), top_k=4, **ROUTE)
    plain, scaled = route(logits, 4), op(tensor(logits), tensor(scale, dtype)).asnumpy()
    assert np.array_equal(scaled[:, :4], plain[0])
    assert np.allclose(scaled[:, 4:], plain[1] * stored(scale, dtype)[plain[0]], rtol=1e-6)


def test_of_equal_experts_the_first_are_chosen():
    ids, weights = route(np.zeros((3, 20), np.float32), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert np.allclose(weights, 0.25)
    ids, _ = route(np.zeros((3, 20), np.float32), 4, num_expert_group=2, topk_group=2, balanced=True)
    assert ids.tolist() == [[0, 1, 10, 11]] * 3


def test_logits_that_are_no_numbers_give_different_experts():
    logits = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    logits[0, 3], logits[1, 4], logits[2, 5] = np.nan, np.inf, -np.inf
    logits[3], logits[4] = np.nan, -np.inf
    for scoring, groups in itertools.product(("softmax", "sigmoid"), (1, 4)):
        options = dict(scoring=scoring, num_expert_group=groups, topk_group=(groups + 1) // 2)
        ids, weights = route(logits, 5, **options)
        assert all(len(set(row)) == 5 for row in ids.tolist()) and ids.min() >= 0 and ids.max() < 16
        expected_ids, expected = routing_of(logits[5:], 5, **{**ROUTE, **options})
        assert np.array_equal(ids[5:], expected_ids) and np.abs(weights[5:] / expected - 1).max() < 2e-6
    for scoring in ("softmax", "sigmoid"):
        ids, _ = route(logits, 4, scoring=scoring, num_expert_group=4, topk_group=4, balanced=True)
        assert [sorted(row // 4) for row in ids] == [[0, 1, 2, 3]] * 6
    ids, weights = route(logits, 5, scoring="sigmoid")
    assert 3 not in ids[0] and np.isfinite(weights[0]).all(), "an expert without a number is the last choice"
    assert ids[1, 0] == 4 and 5 not in ids[2] and np.isfinite(weights[2]).all()


def test_impossible_routing_is_refused():
    logits = tensor(np.zeros((2, 12), np.float32))
    for options, message in (
        (dict(num_expert_group=5, topk_group=2), "12 experts do not divide into 5 groups"),
        (dict(num_expert_group=4, topk_group=1), "top_k: 4 of 3 experts"),
    ):
        op = registry.build("moe_route", "cpu", (), top_k=4, **{**ROUTE, **options})
        with pytest.raises(RuntimeError, match=message):
            op(logits)
    op = registry.build("moe_route", "cpu", ("expert_scale",), top_k=4, **ROUTE)
    with pytest.raises(RuntimeError, match="expert_scale and experts: 11 against 12"):
        op(logits, tensor(np.ones(11, np.float32)))
    for options, message in (
        (dict(scoring="relu"), "scoring 'relu'"),
        (dict(topk_group=2), "topk_group 2 of 1"),
        (dict(top_k=0), "top_k 0"),
        (dict(top_k=4, num_expert_group=3, topk_group=3, balanced=True), "top_k 4 balanced over 3 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.build("moe_route", "cpu", (), **{"top_k": 1, **ROUTE, **options})
