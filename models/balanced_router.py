"""Routing that gives every group of experts the same work: "Mixture of Grouped Experts", https://arxiv.org/abs/2505.21411.

Scores are one softmax over all N experts. Of each of M groups of N / M neighbours, the top_k / M best experts are
chosen; weights are their scores, as they are, times a scale that each expert has learned. Where ranks hold whole
groups, all of them compute as many pairs of token and expert, whatever the tokens.
"""

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter


class GroupBalancedRouter(BaseRouter):
    """The best experts of each group, equally many of all.

    expert_scale: [global_num_experts], any float type.

    Raises:
        ValueError: the experts, or those of a token, do not divide into the groups.
    """

    def __init__(self, top_k: int, global_num_experts: int, num_expert_group: int, expert_scale: torch.Tensor):
        super().__init__(top_k, global_num_experts)
        require_groups(top_k, global_num_experts, num_expert_group)
        self.num_expert_group = num_expert_group
        self.expert_scale = expert_scale

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """router_logits [num_tokens, num_experts] → weights float32 and ids, both [num_tokens, top_k], group by group.

        What `moe_route` computes, for platforms that have no such operator.
        """
        scores = router_logits.float().softmax(-1)
        grouped = scores.unflatten(-1, (self.num_expert_group, -1))
        weights, within = grouped.topk(self.top_k // self.num_expert_group, dim=-1)
        size = grouped.shape[-1]
        first = torch.arange(0, self.global_num_experts, size, device=within.device)
        ids = (within + first[:, None]).flatten(-2)
        weights = weights.flatten(-2) * self.expert_scale.float()[ids]
        return weights, ids.to(torch.int32 if indices_type is None else indices_type)


def require_groups(top_k: int, num_experts: int, num_expert_group: int) -> None:
    """Raises ValueError unless `num_experts` and the `top_k` of a token divide into the groups, no group too small."""
    if num_expert_group < 1 or num_experts % num_expert_group:
        raise ValueError(f"{num_experts} experts do not divide into {num_expert_group} groups of equal size")
    if top_k < 1 or top_k % num_expert_group:
        raise ValueError(f"{top_k} experts a token are not equally many of {num_expert_group} groups")
    if top_k > num_experts:
        raise ValueError(f"{top_k} experts a token, of {num_experts} in all")
