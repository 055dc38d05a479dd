"""Pangu Pro MoE written from its paper, https://arxiv.org/abs/2505.21411, and nothing else: what ours must equal.

One sequence at a time, no KV cache, every formula in the dtype of the weights but for norms and softmax, which are at
least float32. Tensors are named as in the checkpoint.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PanguProMoEReferenceConfig(LlamaConfig):
    """n_group: M of the paper, num_experts_per_tok unless given. scale_experts: whether `router_scale` is used."""

    model_type = "pangu_pro_moe_reference"

    num_experts: int = 4
    num_experts_per_tok: int = 2
    n_group: int | None = None
    moe_intermediate_size: int = 32
    shared_expert_intermediate_size: int = 32
    mlp_only_layers: list[int] | None = None
    scale_experts: bool = True


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, config: PanguProMoEReferenceConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(x)
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): an expert, the shared expert, and a dense layer's MLP."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupedExperts(nn.Module):
    """S = softmax(W h); G' keeps the K / M largest of each of M groups of S, else 0; y = sum of G'_i E_i(h)."""

    def __init__(self, config: PanguProMoEReferenceConfig):
        super().__init__()
        self.groups = config.n_group or config.num_experts_per_tok
        self.of_each_group = config.num_experts_per_tok // self.groups
        self.scaled = config.scale_experts
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.router_scale = nn.Parameter(torch.ones(1, config.num_experts))
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_expert = GatedMLP(config.hidden_size, config.shared_expert_intermediate_size)

    def gating(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] → [T, num_experts], zero for the experts that are not chosen."""
        scores = at_least_float32(self.gate(hidden)).softmax(-1).unflatten(-1, (self.groups, -1))
        place_in_group = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        kept = torch.where(place_in_group < self.of_each_group, scores, 0).flatten(-2)
        return kept * self.router_scale if self.scaled else kept

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = self.shared_expert(hidden)
        for weights, expert in zip(self.gating(hidden).unbind(-1), self.experts, strict=True):
            tokens = weights.nonzero()[:, 0]
            result[tokens] += (weights[tokens, None] * expert(hidden[tokens])).to(hidden.dtype)
        return result


class Attention(nn.Module):
    """Causal attention with grouped queries, rotary embedding and a bias on every projection."""

    def __init__(self, config: PanguProMoEReferenceConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.theta, size = config.rope_parameters["rope_theta"], config.hidden_size
        kv_size = size // self.heads * self.kv_heads
        self.q_proj, self.o_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.k_proj, self.v_proj = nn.Linear(size, kv_size), nn.Linear(size, kv_size)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, T, head_size] of positions 0 to T - 1; element i turns with element i + head_size / 2."""
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        length = len(hidden)
        q = self.rotated(self.q_proj(hidden).view(length, self.heads, -1).transpose(0, 1))
        k = self.rotated(self.k_proj(hidden).view(length, self.kv_heads, -1).transpose(0, 1))
        v = self.v_proj(hidden).view(length, self.kv_heads, -1).transpose(0, 1)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (k, v))
        scores = at_least_float32(q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype)
        return self.o_proj((weights @ v).transpose(0, 1).reshape(length, -1))


class Layer(nn.Module):
    def __init__(self, config: PanguProMoEReferenceConfig, index: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(config), Norm(config)
        self.self_attn = Attention(config)
        dense = index in (config.mlp_only_layers or [])
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else GroupedExperts(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PanguProMoEReferenceModel(PreTrainedModel):
    """input_ids [1, T] → logits [1, T, vocab_size]."""

    config_class = PanguProMoEReferenceConfig

    def __init__(self, config: PanguProMoEReferenceConfig):
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.model.norm = Norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        hidden = self.model.embed_tokens(input_ids[0])
        for layer in self.model.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.lm_head(self.model.norm(hidden))[None])


AutoConfig.register(PanguProMoEReferenceConfig.model_type, PanguProMoEReferenceConfig)
AutoModelForCausalLM.register(PanguProMoEReferenceConfig, PanguProMoEReferenceModel)
