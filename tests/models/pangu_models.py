"""openPangu's mixtures of experts for reference, on top of Hugging Face's DeepSeek V3, which it has no classes for.

Both normalize what attention and MLP return, before it is added ("sandwich norm"), and route by sigmoid with a
correction bias and without groups. Ultra MoE has DeepSeek's attention (https://arxiv.org/abs/2505.04519). Pro MoE V2
has grouped queries, values narrower than keys, a norm of the keys, a rotation of each head's first elements, and
learned keys and values that every token sees beside those of its context.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm


class SandwichLayer(DeepseekV3DecoderLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pre_mlp_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_mlp_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **arguments) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_mlp_layernorm(self.mlp(self.pre_mlp_layernorm(hidden_states)))


class SinkAttention(nn.Module):
    """Attention of Pro MoE V2: [batch, tokens, hidden_size] in and out."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head, value = config.qk_rope_dim + config.qk_nope_dim, config.v_channels
        self.parts = [heads * head, kv_heads * head, kv_heads * value]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.parts), bias=False)
        self.o_proj = nn.Linear(heads * value, config.hidden_size, bias=False)
        self.k_layernorm = DeepseekV3RMSNorm(head, eps=config.rms_norm_eps)
        self.param_sink_key = nn.Parameter(torch.zeros(config.param_sink_number, kv_heads, head))
        self.param_sink_value = nn.Parameter(torch.zeros(config.param_sink_number, kv_heads, value))

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **unused):
        batch, tokens, _ = hidden_states.shape
        kv_heads = self.config.num_key_value_heads
        query, key, value = self.qkv_proj(hidden_states).split(self.parts, dim=-1)
        query = query.view(batch, tokens, self.config.num_attention_heads, -1).transpose(1, 2)
        key = self.k_layernorm(key.view(batch, tokens, kv_heads, -1)).transpose(1, 2)
        value = value.view(batch, tokens, kv_heads, -1).transpose(1, 2)
        query, key = (self.rotate(x, *position_embeddings) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        sinks = self.k_layernorm(self.param_sink_key), self.param_sink_value
        key, value = (
            torch.cat([sink.transpose(0, 1)[None].expand(batch, -1, -1, -1), x], dim=2).repeat_interleave(
                self.config.num_attention_heads // kv_heads, dim=1
            )
            for sink, x in zip(sinks, (key, value), strict=True)
        )
        mask = nn.functional.pad(attention_mask, (self.config.param_sink_number, 0))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
        weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
        return self.o_proj((weights @ value).transpose(1, 2).reshape(batch, tokens, -1)), None

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [batch, heads, tokens, head_size]: its first elements, each even one with the odd one after it."""
        size = self.config.qk_rope_dim
        even, odd = x[..., 0:size:2], x[..., 1:size:2]
        cos, sin = (table[:, None, :, : size // 2] for table in (cos, sin))
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([rotated, x[..., size:]], dim=-1)


class PanguUltraMoeConfig(DeepseekV3Config):
    model_type = "reference_pangu_ultra_moe"


class PanguProMoeV2Config(DeepseekV3Config):
    """qk_nope_dim, qk_rope_dim, v_channels: sizes of a head; param_sink_number: learned keys and values of a head."""

    model_type = "reference_pangu_pro_moe_v2"


class PanguUltraMoe(DeepseekV3ForCausalLM):
    config_class = PanguUltraMoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(SandwichLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class PanguProMoeV2(PanguUltraMoe):
    config_class = PanguProMoeV2Config

    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = SinkAttention(config, i)
        self.post_init()


for _model in (PanguUltraMoe, PanguProMoeV2):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
