"""What vLLM's routers and experts do is what the operators are told to do, or is refused by name."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.models.balanced_router import GroupBalancedRouter
from vllm_mindspore.ops import registry
from vllm_mindspore.worker.moe import Routing, expert_activation, routing_of

GROUPS = dict(use_grouped_topk=True, num_expert_group=4, topk_group=2)
BIAS = dict(e_score_correction_bias=torch.zeros(12))


def routing(**options) -> Routing:
    return routing_of(create_fused_moe_router(**{"top_k": 3, "global_num_experts": 12, **options}), "layers.0.experts")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Routing(3, "softmax", True)),
        (dict(renormalize=False, scoring_func="sigmoid"), Routing(3, "sigmoid", False)),
        ({**BIAS, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
         Routing(3, "sigmoid", True, biased=True, scale=2.5)),
        (GROUPS, Routing(3, "softmax", True, num_expert_group=4, topk_group=2)),
        ({**GROUPS, **BIAS, "routed_scaling_factor": 1.5}, Routing(3, "softmax", True, True, 4, 2, 1.5)),
        # groups that cannot be formed: no groups and, without a bias, an unscaled softmax, as vLLM does
        ({**GROUPS, **BIAS, "num_expert_group": 5, "scoring_func": "sigmoid", "routed_scaling_factor": 1.5},
         Routing(3, "sigmoid", True, biased=True, scale=1.5)),
        ({**GROUPS, "num_expert_group": 5, "scoring_func": "sigmoid", "routed_scaling_factor": 1.5},
         Routing(3, "softmax", True)),
    ],
)  # fmt: skip
def test_routers_are_read(options, expected):
    assert routing(**options) == expected


def test_functions_that_are_top_k_of_sigmoids_are_known():
    from vllm.model_executor.models.cohere2_moe import token_choice_with_bias
    from vllm.model_executor.models.llama4 import Llama4MoE

    for function, renormalize, expected in (
        (Llama4MoE.custom_routing_function, True, False),
        (token_choice_with_bias, True, True),
        (token_choice_with_bias, False, False),
    ):
        router = CustomRoutingRouter(2, 12, function, renormalize=renormalize)
        assert routing_of(router, "x") == Routing(2, "sigmoid", expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(custom_routing_function=lambda **_: None), r"CustomRoutingRouter\(.*<lambda>"),
        ({**BIAS, "scoring_func": "sqrtsoftplus"}, r"FusedTopKBiasRouter\(scoring_func=sqrtsoftplus"),
        (dict(hash_indices_table=torch.zeros(5, 3)), r"_hash_indices_table=a tensor \[5, 3\]"),
        ({**BIAS, "zero_expert_type": "identity", "num_logical_experts": 10}, "ZeroExpertRouter"),
    ],
)
def test_routing_without_an_operator_is_refused(options, message):
    found = rf"the router of layers\.0\.experts: found .*{message}.*supports top-k"
    with pytest.raises(UnsupportedOptionError, match=found):
        routing(**options)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_grouped_routing_gives_what_vllms_own_code_gives(biased, scoring, renormalize):
    random = torch.Generator().manual_seed(3)
    logits, bias = torch.randn(40, 24, generator=random), torch.randn(24, generator=random)
    weights, ids = grouped_topk(
        logits, logits, 5, renormalize, 6, 3, scoring, 1.5, e_score_correction_bias=bias if biased else None
    )
    op = registry.build(
        "moe_route", "cpu", ("bias",) if biased else (), top_k=5, scoring=scoring, renormalize=renormalize,
        num_expert_group=6, topk_group=3, balanced=False, scale=1.5,
    )  # fmt: skip
    found = op(ms.Tensor(logits.numpy()), *([ms.Tensor(bias.numpy())] if biased else [])).asnumpy()
    for row in range(40):
        theirs = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        ours = dict(zip(found[row, :5].astype(int).tolist(), found[row, 5:].tolist(), strict=True))
        assert ours.keys() == theirs.keys()
        assert np.allclose([ours[e] for e in theirs], list(theirs.values()), rtol=3e-6)


@pytest.mark.parametrize("top_k", [6, 12, 24])
def test_balanced_routing_gives_what_the_routers_own_code_gives(top_k):
    random = torch.Generator().manual_seed(top_k)
    logits, scale = torch.randn(40, 24, generator=random), torch.rand(24, generator=random) + 0.5
    router = GroupBalancedRouter(top_k, 24, 6, scale)
    known = routing_of(router, "layers.0.experts")
    assert known == Routing(
        top_k, "softmax", False, num_expert_group=6, topk_group=6, balanced=True, expert_scaled=True
    )
    weights, ids = router.select_experts(logits, logits)
    op = registry.build(
        "moe_route", "cpu", ("expert_scale",), top_k=top_k, scoring=known.scoring, renormalize=known.renormalize,
        num_expert_group=known.num_expert_group, topk_group=known.topk_group, balanced=known.balanced,
        scale=known.scale,
    )  # fmt: skip
    found = op(ms.Tensor(logits.numpy()), ms.Tensor(scale.numpy())).asnumpy()
    for row in range(40):
        theirs = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        ours = dict(zip(found[row, :top_k].astype(int).tolist(), found[row, top_k:].tolist(), strict=True))
        assert ours.keys() == theirs.keys() and len(ours) == top_k
        assert np.allclose([ours[e] for e in theirs], list(theirs.values()), rtol=3e-6)


@pytest.mark.parametrize(
    ("top_k", "experts", "groups", "message"),
    [
        (8, 60, 8, "60 experts do not divide into 8 groups"),
        (6, 64, 4, "6 experts a token are not equally many of 4 groups"),
        (16, 8, 8, "16 experts a token, of 8 in all"),
        (8, 64, 0, "64 experts do not divide into 0 groups"),
    ],
)
def test_groups_that_cannot_be_balanced_are_refused(top_k, experts, groups, message):
    with pytest.raises(ValueError, match=message):
        GroupBalancedRouter(top_k, experts, groups, torch.ones(experts))


def activation(kind: MoEActivation, limit=None, alpha=None, beta=None) -> dict:
    return expert_activation(
        SimpleNamespace(
            layer_name="layers.0.experts", activation=kind, swiglu_limit=limit, swiglu_alpha=alpha, swiglu_beta=beta,
            moe_config=SimpleNamespace(swiglu_limit=None),
        )
    )  # fmt: skip


def test_activations_are_read():
    clamped = dict(activation="clamped_silu_and_mul", interleaved=False)
    assert activation(MoEActivation.SILU) == dict(
        activation="silu_and_mul", interleaved=False, alpha=1.0, beta=0.0, limit=0.0
    )
    assert activation(MoEActivation.RELU2_NO_MUL)["activation"] == "relu2"
    assert activation(MoEActivation.SILU, limit=5.0) == dict(clamped, alpha=1.0, beta=0.0, limit=5.0)
    assert activation(MoEActivation.SWIGLUOAI) == dict(clamped, interleaved=True, alpha=1.702, beta=1.0, limit=7.0)
    assert activation(MoEActivation.SWIGLUOAI_UNINTERLEAVE, 6.0, 1.5, 1.0) == dict(
        clamped, alpha=1.5, beta=1.0, limit=6.0
    )


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(MoEActivation.SITU, None), (MoEActivation.SWIGLUSTEP, 7.0), (MoEActivation.GELU, 3.0),
     (MoEActivation.SWIGLUOAI_UNINTERLEAVE, None)],
)  # fmt: skip
def test_activations_without_an_operator_are_refused(kind, limit):
    found = rf"the experts of layers\.0\.experts: found activation {kind.value}"
    with pytest.raises(UnsupportedOptionError, match=found):
        activation(kind, limit)
