"""vLLM's mixture-of-experts layers in operators of ours: `moe_route`, `moe_experts`, and what is between them.

vLLM looks both replacements below up by class name: the runner, so that the capture sees what is inside the layer, and
the method of experts without quantization. What a layer's router does is read when the layer is made: what has no
operator is refused before any weight is read.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from vllm_mindspore.config import UnsupportedOptionError
from vllm_mindspore.models import expert_parallel
from vllm_mindspore.models.balanced_router import GroupBalancedRouter
from vllm_mindspore.ops.moe import SCORINGS


@dataclass(frozen=True)
class Routing:
    """The attributes of `moe_route`, whether experts are chosen by score plus a correction bias, and whether each has a
    scale of its own."""

    top_k: int
    scoring: str
    renormalize: bool
    biased: bool = False
    num_expert_group: int = 1
    topk_group: int = 1
    scale: float = 1.0
    balanced: bool = False
    expert_scaled: bool = False


def routing_of(router, layer_name: str) -> Routing:
    """What a router of vLLM does.

    Raises:
        UnsupportedOptionError: it does what `moe_route` cannot express.
    """
    read = ROUTERS.get(type(router))
    routing = read(router) if read is not None else None
    if routing is None or routing.scoring not in SCORINGS:
        found = f"{type(router).__name__}({', '.join(_details(router))})"
        raise UnsupportedOptionError(
            f"the router of {layer_name}",
            found,
            "top-k routing by softmax or sigmoid, with or without groups and a correction bias",
            "Use another model.",
        )
    return routing


def _details(router) -> list[str]:
    names = ("scoring_func", "custom_routing_function", "_hash_indices_table", "bias_vl", "num_fused_shared_experts")
    values = {name: getattr(router, name, None) for name in names}
    return [f"{name}={_short(value)}" for name, value in values.items() if isinstance(value, torch.Tensor) or value]


def _short(value) -> object:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return getattr(value, "__qualname__", value)


def _plain(router: FusedTopKRouter) -> Routing:
    return Routing(router.top_k, router.scoring_func, router.renormalize)


def _biased(router: FusedTopKBiasRouter) -> Routing | None:
    if router._hash_indices_table is not None or router.bias_vl is not None or router.num_fused_shared_experts:
        return None
    biased = router.e_score_correction_bias is not None
    return Routing(router.top_k, router.scoring_func, router.renormalize, biased, scale=router.routed_scaling_factor)


def _grouped(router: GroupedTopKRouter) -> Routing | None:
    if router.num_fused_shared_experts:
        return None
    biased, groups = router.e_score_correction_bias is not None, router.num_expert_group
    if router.global_num_experts <= groups or router.global_num_experts % groups:
        # groups that cannot be formed: vLLM falls back to no groups and, without a bias, to an unscaled softmax
        if not biased:
            return Routing(router.top_k, "softmax", router.renormalize)
        groups = 1
    return Routing(
        router.top_k,
        router.scoring_func,
        router.renormalize,
        biased,
        groups,
        router.topk_group if groups > 1 else 1,
        router.routed_scaling_factor,
    )


def _balanced(router: GroupBalancedRouter) -> Routing:
    groups = router.num_expert_group
    return Routing(
        router.top_k,
        "softmax",
        renormalize=False,
        num_expert_group=groups,
        topk_group=groups,
        balanced=True,
        expert_scaled=True,
    )


def _custom(router: CustomRoutingRouter) -> Routing | None:
    renormalize = CUSTOM_SIGMOID.get(getattr(router.custom_routing_function, "__qualname__", ""))
    return None if renormalize is None else Routing(router.top_k, "sigmoid", renormalize(router))


ROUTERS: dict[type, Callable[..., Routing | None]] = {
    FusedTopKRouter: _plain,
    FusedTopKBiasRouter: _biased,
    GroupedTopKRouter: _grouped,
    GroupBalancedRouter: _balanced,
    CustomRoutingRouter: _custom,
}
# Functions that models bring along and that are top-k of sigmoids; whether the weights are divided by their sum.
CUSTOM_SIGMOID: dict[str, Callable[[CustomRoutingRouter], bool]] = {
    "Llama4MoE.custom_routing_function": lambda router: False,
    "token_choice_with_bias": lambda router: router.renormalize,
}


def expert_activation(layer) -> dict[str, object]:
    """The attributes of `moe_experts` that say what is between the two products of `layer` (a `RoutedExperts`).

    Raises:
        UnsupportedOptionError: there is no such activation.
    """
    limit = layer.swiglu_limit if layer.swiglu_limit is not None else layer.moe_config.swiglu_limit
    name, interleaved, alpha, beta = ACTIVATIONS.get(layer.activation), False, 1.0, 0.0
    if layer.activation == MoEActivation.SWIGLUOAI:
        name, interleaved, alpha, beta, limit = "clamped_silu_and_mul", True, 1.702, 1.0, 7.0
    elif layer.activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE and limit is not None:
        name, alpha, beta = "clamped_silu_and_mul", layer.swiglu_alpha or 1.0, layer.swiglu_beta or 0.0
    elif limit is not None:
        name = "clamped_silu_and_mul" if layer.activation == MoEActivation.SILU else None
    if name is None:
        raise UnsupportedOptionError(
            f"the experts of {layer.layer_name}",
            f"activation {layer.activation.value}" + (f" with limit {limit}" if limit is not None else ""),
            ", ".join(activation.value for activation in ACTIVATIONS) + ", swigluoai and silu with a limit",
            "Use another model.",
        )
    return dict(activation=name, interleaved=interleaved, alpha=alpha, beta=beta, limit=limit or 0.0)


ACTIVATIONS = {
    MoEActivation.SILU: "silu_and_mul",
    MoEActivation.GELU: "gelu_and_mul",
    MoEActivation.GELU_TANH: "gelu_tanh_and_mul",
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}


class MindSporeMoERunner(MoERunner):
    """vLLM's runner, without the opaque operator around the layer: the block of `models/expert_parallel.py` instead.

    `tokens_of_experts` is, after a forward, how many of this rank's tokens chose each expert: [num_experts] float32.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        layer = self.routed_experts
        routing = routing_of(self.router, self.layer_name)
        if not layer.apply_router_weight_on_input:  # else what follows is not linear in the weights
            routing = replace(routing, scale=routing.scale * self.routed_scaling_factor)
            self.routed_scaling_factor = 1.0
        layer.routing = routing
        if routing.expert_scaled:
            layer.expert_scale = self.router.expert_scale
        self.layout = expert_parallel.layout_of(layer)
        expert_map = expert_parallel.expert_map_of(layer, self.layout)
        layer.register_buffer("logical_to_physical", expert_map, persistent=False)
        self.tokens_of_experts: torch.Tensor | None = None

    @property
    def do_naive_dispatch_combine(self) -> bool:
        return False

    def _sequence_parallel_context(self):
        return nullcontext()  # tokens are not cut into parts: see config._update

    def _select_forward(self) -> Callable:
        return lambda hidden_states, router_logits, shared_input, input_ids, *_: self._forward_impl(
            hidden_states, router_logits, shared_input, input_ids
        )

    def _apply_quant_method(
        self, hidden_states, router_logits, shared_experts_input, input_ids=None, shared_experts_overlapping=False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        layer = self.routed_experts
        routing = route(layer, router_logits)
        self.tokens_of_experts = torch.ops.vllm_ms.moe_count(routing, layer.global_num_experts)

        def experts(x: torch.Tensor, local_routing: torch.Tensor) -> torch.Tensor:
            return layer.quant_method.experts(layer, x, local_routing)

        def shared() -> torch.Tensor | None:
            if self._shared_experts is None:
                return None
            self._maybe_apply_shared_experts(shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
            return self._shared_experts.output

        return expert_parallel.run(hidden_states, routing, layer.logical_to_physical, self.layout, experts, shared)


class MindSporeExpertsMethod(UnquantizedFusedMoEMethod):
    """Experts with float weights, which stay as vLLM's loader leaves them."""

    def create_weights(self, layer, *args, **kwargs) -> None:
        self.activation = expert_activation(layer)
        super().create_weights(layer, *args, **kwargs)

    @property
    def is_monolithic(self) -> bool:
        return True

    def process_weights_after_loading(self, layer) -> None:
        """Nothing: the operator reads the weights where they are."""

    def get_fused_moe_quant_config(self, layer):
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def experts(self, layer, x: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden_size], routing [num_tokens, 2 * top_k] of slots here → [num_tokens, hidden_size]."""
        activation = self.activation
        return torch.ops.vllm_ms.moe_experts(
            x,
            routing,
            layer.w13_weight,
            layer.w2_weight,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            None,
            None,
            None,
            "",
            0.0,
            0.0,
            activation["activation"],
            activation["interleaved"],
            activation["alpha"],
            activation["beta"],
            activation["limit"],
            layer.apply_router_weight_on_input,
        )


def route(layer, router_logits: torch.Tensor) -> torch.Tensor:
    """`moe_route` as the router of `layer` (a `RoutedExperts`) says: [num_tokens, 2 * top_k]."""
    routing = layer.routing
    return torch.ops.vllm_ms.moe_route(
        router_logits,
        layer.e_score_correction_bias if routing.biased else None,
        layer.expert_scale if routing.expert_scaled else None,
        routing.top_k,
        routing.scoring,
        routing.renormalize,
        routing.num_expert_group,
        routing.topk_group,
        routing.balanced,
        routing.scale,
    )


REPLACEMENTS = {"MoERunner": MindSporeMoERunner, "UnquantizedFusedMoEMethod": MindSporeExpertsMethod}
