"""Mixture of experts: which experts a token goes to, and what they compute."""

from __future__ import annotations

from vllm_mindspore.ops import columns
from vllm_mindspore.ops.activation import ACTIVATIONS
from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.linear import NORMS
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

SCORINGS = ("softmax", "sigmoid")
EXPERT_ACTIVATIONS = (*ACTIVATIONS, "clamped_silu_and_mul")


def _route_fake(logits, bias, expert_scale, top_k, *_):
    return like_input(logits, (logits.shape[0], 2 * top_k))


def _check_route(given, top_k, scoring, num_expert_group, topk_group, balanced, **_):
    if scoring not in SCORINGS:
        raise ValueError(f"moe_route: scoring {scoring!r} is not one of {SCORINGS}")
    if top_k < 1:
        raise ValueError(f"moe_route: top_k {top_k} is not positive")
    if not 1 <= topk_group <= num_expert_group:
        raise ValueError(f"moe_route: topk_group {topk_group} of {num_expert_group} groups")
    if balanced and top_k % topk_group:
        raise ValueError(f"moe_route: top_k {top_k} balanced over {topk_group} groups")


def _count_fake(routing, experts):
    return like_input(routing, (experts,))


def _like_routing(routing, *_):
    return like_input(routing)


def _experts_fake(x, routing, w13, w2, *_):
    return like_input(x, (x.shape[0], w2.shape[1]))


def _check_experts(given, norm, activation, interleaved, **_):
    if activation not in EXPERT_ACTIVATIONS:
        raise ValueError(f"moe_experts: activation {activation!r} is not one of {EXPERT_ACTIVATIONS}")
    if interleaved and not activation.endswith("_and_mul"):
        raise ValueError(f"moe_experts: interleaved is for gated activations, not {activation!r}")
    if norm not in NORMS:
        raise ValueError(f"moe_experts: norm {norm!r} is not one of {NORMS}")
    if "norm_bias" in given and norm != "layer":
        raise ValueError("moe_experts: norm_bias is for norm='layer' only")
    if "norm_weight" in given and not norm:
        raise ValueError("moe_experts: norm_weight given without a norm")


def _experts_columns(shapes, attributes):
    parts = 2 if attributes["activation"].endswith("_and_mul") else 1
    fit = columns.fits(shapes["w13"], parts) and columns.fits(shapes["w2"])
    return {"w13", "w2"} if fit and not attributes["interleaved"] else set()


OPERATORS = [
    Operator(
        # logits [T, E] f32, bias [E], expert_scale [E]; [T, 2 * top_k]: expert ids, best first, then their weights.
        # Experts are chosen by scoring(logits) + bias, from the best topk_group of num_expert_group groups; equally
        # many of each if balanced. Weights are scoring(logits), divided by their sum if renormalize, times scale and
        # the chosen expert's expert_scale.
        name="moe_route",
        schema=Schema.parse(
            "(Tensor logits, Tensor? bias, Tensor? expert_scale, int top_k, str scoring, bool renormalize,"
            " int num_expert_group, int topk_group, bool balanced, float scale) -> Tensor"
        ),
        fake=_route_fake,
        cpu="MoeRoute",
        ascend=ascend_cell("MoeRoute", "moe_ascend"),
        check=_check_route,
    ),
    Operator(
        # routing as above; [experts]: how many tokens chose each
        name="moe_count",
        schema=Schema.parse("(Tensor routing, int experts) -> Tensor"),
        fake=_count_fake,
        cpu="MoeCount",
        ascend=ascend_cell("MoeCount", "moe_ascend"),
    ),
    Operator(
        # routing as above, expert_map [E, R] int32: the places of each expert, then -1; the routing with places for
        # ids. Tokens take an expert's places in turn.
        name="moe_place",
        schema=Schema.parse("(Tensor routing, Tensor expert_map) -> Tensor"),
        fake=_like_routing,
        cpu="MoePlace",
        ascend=ascend_cell("MoePlace", "moe_ascend"),
    ),
    Operator(
        # routing as above; the routing with ids relative to `first`, -1 where they are not in [first, first + count)
        name="moe_local",
        schema=Schema.parse("(Tensor routing, int first, int count) -> Tensor"),
        fake=_like_routing,
        cpu="MoeLocal",
        ascend=ascend_cell("MoeLocal", "moe_ascend"),
    ),
    Operator(
        # x [T, H] f32, routing as above, w13 [E, 2 * I, H] (gate rows, then up rows; alternating if interleaved) or
        # [E, I, H] without a gate, w2 [E, N, I], biases [E, 2 * I] and [E, N]. Result [T, N]: the sum over a token's
        # experts of weight * w2(act(w13(norm(x)))), + residual. Ids outside of [0, E) contribute nothing. alpha, beta
        # and limit are for clamped_silu_and_mul: min(g, limit) sigmoid(alpha min(g, limit)) (clamp(u, -limit, limit)
        # + beta). weight_on_input (top_k 1): the weight multiplies norm(x) instead.
        name="moe_experts",
        schema=Schema.parse(
            "(Tensor x, Tensor routing, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor? residual,"
            " Tensor? norm_weight, Tensor? norm_bias, str norm, float eps, float norm_offset, str activation,"
            " bool interleaved, float alpha, float beta, float limit, bool weight_on_input) -> Tensor"
        ),
        fake=_experts_fake,
        cpu="MoeExperts",
        ascend=ascend_cell("MoeExperts", "moe_ascend"),
        check=_check_experts,
        columns=_experts_columns,
    ),
]
