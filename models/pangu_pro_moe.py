"""Pangu Pro MoE 72B (https://arxiv.org/abs/2505.21411), which vLLM does not have.

Llama's attention with a bias on every projection; in each layer experts whose groups get the same work, beside one
expert that all tokens share.

vLLM's `PanguProMoEV2ForCausalLM` is another architecture.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from vllm_mindspore.models.balanced_router import GroupBalancedRouter, require_groups

STACKED = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        # the layer of experts loads its own gate_proj and up_proj
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
        ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
    }
)


def expert_groups(config) -> int:
    """How many groups a configuration's experts form.

    Raises:
        ValueError: its experts, or those of a token, do not divide into that many.
    """
    n_group = getattr(config, "n_group", None)
    groups = config.num_experts_per_tok if n_group is None else n_group
    require_groups(config.num_experts_per_tok, config.num_experts, groups)
    return groups


class PanguProMoESparseBlock(nn.Module):
    """A router, its experts and the shared expert: [num_tokens, hidden_size] → the same."""

    def __init__(self, config, quant_config, prefix: str):
        super().__init__()
        self.router_scale = nn.Parameter(torch.ones(config.num_experts), requires_grad=False)
        self.router_scale.weight_loader = _load_row
        self.gate = GateLinear(config.hidden_size, config.num_experts, prefix=f"{prefix}.gate")
        self.shared_expert = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = LlamaMLP(
                config.hidden_size,
                config.shared_expert_intermediate_size,
                config.hidden_act,
                quant_config=quant_config,
                reduce_results=False,  # once, with the experts' results
                prefix=f"{prefix}.shared_expert",
            )
        router = GroupBalancedRouter(
            config.num_experts_per_tok, config.num_experts, expert_groups(config), self.router_scale
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=False,
            router=router,
            shared_experts=self.shared_expert,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=router_logits)


class PanguProMoEDecoderLayer(nn.Module):
    """Attention, then experts; in the layers that `mlp_only_layers` of the configuration names, an MLP instead."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.self_attn = LlamaAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant_config,
            bias=True,
            bias_o_proj=True,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        if extract_layer_index(prefix) in (getattr(config, "mlp_only_layers", None) or []):
            self.mlp = LlamaMLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp",
            )
        else:
            self.mlp = PanguProMoESparseBlock(config, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T], hidden_states and residual [T, hidden_size] → hidden_states and residual."""
        if residual is None:
            hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class PanguProMoEModel(LlamaModel):
    """Embedding, layers, norm."""

    hf_to_vllm_mapper = STACKED


class PanguProMoEForCausalLM(LlamaForCausalLM):
    """Pangu Pro MoE 72B.

    Raises:
        ValueError: the experts do not divide into the groups of the configuration.
    """

    hf_to_vllm_mapper = STACKED

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        expert_groups(vllm_config.model_config.hf_config)  # before any memory is taken
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PanguProMoEDecoderLayer)

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] | None = None):
        return PanguProMoEModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


def _load_row(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
    """[n] from the checkpoint's [1, n]."""
    parameter.data.copy_(loaded.reshape(parameter.shape))
