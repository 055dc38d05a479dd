"""The expert-parallel block: what happens between a layer's router and the sum of its experts, in operators of ours.

One rank:            route → count, experts
Ranks that share their tokens (tensor parallelism):
                     route → count, place → the local experts; the model adds up the ranks' results
Ranks with tokens of their own (data parallelism):
                     route → count, place → gather_rows(start), dispatch(start) → shared experts
                     → gather_rows(wait), dispatch(wait) → the local experts → combine(start, wait)

Where experts are is a tensor of the graph, `expert_map` [num_experts, replicas]: the places that have each of them,
then -1. Place p is slot p % capacity of expert-parallel rank p // capacity. Writing other places into it (and other
weights into the slots) compiles nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

GROUP = "dp"  # the ranks that exchange: those that have the same place in their tensor-parallel groups
TOKEN_RANKS = "token_ranks"  # in the forward context: the rank of each token of the step, over all data-parallel ranks


@dataclass(frozen=True)
class Layout:
    """How a layer's experts are spread over ranks.

    capacity: places on an expert-parallel rank; 0 where every rank has a part of every expert.
    """

    dp_rank: int
    dp_size: int
    capacity: int
    ep_rank: int
    tp_size: int

    @property
    def group(self) -> tuple[int, int, str]:
        """The attributes that name the ranks which exchange, and this one among them."""
        return self.dp_rank, self.dp_size, GROUP

    @property
    def holders(self) -> tuple[int, int, int, int, int, str]:
        """Beside these, those that say which of the ranks has a place."""
        columns = (self.tp_size, self.ep_rank % self.tp_size) if self.capacity else (1, 0)
        return self.capacity, *columns, *self.group


def layout_of(layer) -> Layout:
    """Of a `RoutedExperts`."""
    parallel = layer.moe_config.moe_parallel_config
    return Layout(
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        capacity=-(-layer.global_num_experts // parallel.ep_size) if parallel.use_ep else 0,
        ep_rank=parallel.ep_rank,
        tp_size=max(1, parallel.ep_size // parallel.dp_size),
    )


def expert_map_of(layer, layout: Layout) -> torch.Tensor | None:
    """[num_experts, 1] int32, the place of each expert as vLLM's loader fills them; None where all are everywhere."""
    if layout.capacity == 0:
        return None
    manager = layer.expert_map_manager
    places = torch.full((layer.global_num_experts, 1), -1, dtype=torch.int32)
    for rank in range(manager.ep_size):
        _, local, _ = determine_expert_map(manager.ep_size, rank, layer.global_num_experts, manager.placement_strategy)
        if local is None:  # one rank
            local = torch.arange(layer.global_num_experts, dtype=torch.int32)
        here = local >= 0
        places[here, 0] = rank * layout.capacity + local[here]
    return places


def run(
    x: torch.Tensor,
    routing: torch.Tensor,
    expert_map: torch.Tensor | None,
    layout: Layout,
    experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shared: Callable[[], torch.Tensor | None],
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(the shared experts' result, that of the routed ones), of this rank's tokens.

    x [num_tokens, hidden_size]; routing [num_tokens, 2 * top_k], of `moe_route`. experts(x, routing) computes local
    experts, whose ids are slots of this rank.
    """
    operators = torch.ops.vllm_ms
    if expert_map is not None:
        routing = operators.moe_place(routing, expert_map)
    if layout.dp_size == 1:
        return shared(), experts(x, _local(routing, layout))
    token_ranks = get_forward_context().additional_kwargs[TOKEN_RANKS]
    gathering = operators.gather_rows_start(routing, token_ranks, *layout.group)
    dispatching = operators.moe_dispatch_start(x, token_ranks, *layout.group)
    shared_result = shared()
    every_routing = operators.gather_rows_wait(gathering, routing, token_ranks, *layout.group)
    rows = operators.moe_dispatch_wait(dispatching, x, every_routing, token_ranks, *layout.holders)
    results = experts(rows, _local(every_routing, layout))
    combining = operators.moe_combine_start(results, every_routing, token_ranks, *layout.holders)
    combined = operators.moe_combine_wait(combining, results, every_routing, token_ranks, routing, *layout.holders)
    return shared_result, combined


def _local(routing: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The routing with slots of this rank for places."""
    if layout.capacity == 0:
        return routing
    return torch.ops.vllm_ms.moe_local(routing, layout.ep_rank * layout.capacity, layout.capacity)
