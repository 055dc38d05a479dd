"""Families with mixtures of experts, as tiny random models: `families.py` says what the fields mean.

Numbers of experts and their sizes are as awkward as the rest: rarely powers of two, never multiples of 16.
"""

from transformers import (
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from . import hub_formats
from .family import Family, Scales, dims, make, rope
from .pangu_reference import PanguProMoEReferenceConfig

GPT_OSS_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
QK_NORMS = {"q_norm": 1.7, "k_norm": 1.7}

MOE_FAMILIES = [
    Family(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        make(
            Qwen3MoeConfig,
            **dims(112, 4, 2, 151),
            head_dim=32,
            num_experts=11,
            num_experts_per_tok=3,
            moe_intermediate_size=45,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            rope_parameters=rope(theta=1e6),
        ),
        "Qwen3MoeForCausalLM",
        scales=Scales(norm=QK_NORMS),
        notes="softmax, weights renormalized; a dense layer between two with experts",
        seed=2,
    ),
    Family(
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        make(
            Qwen2MoeConfig,
            **dims(120, 5, 5, 151),
            num_experts=9,
            num_experts_per_tok=2,
            moe_intermediate_size=37,
            shared_expert_intermediate_size=75,
        ),
        "Qwen2MoeForCausalLM",
        notes="softmax, weights as they are; a shared expert with a sigmoid gate",
        seed=4,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        make(MixtralConfig, **dims(104, 4, 2, 73), num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
        "MixtralForCausalLM",
        notes="the router outside of the layer of experts",
        seed=1,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        make(OlmoeConfig, **dims(96, 4, 4, 39), num_experts=17, num_experts_per_tok=5, norm_topk_prob=False),
        "OlmoeForCausalLM",
        scales=Scales(norm=QK_NORMS),
        notes="five experts of 17; RMSNorm over all heads of q and k",
        seed=6,
    ),
    Family(
        "glm4-moe",
        "Glm4MoeForCausalLM",
        make(
            Glm4MoeConfig,
            **dims(112, 4, 2, 151),
            head_dim=32,
            attention_bias=True,
            n_routed_experts=12,
            num_experts_per_tok=3,
            moe_intermediate_size=41,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            norm_topk_prob=True,
            rope_parameters=rope(partial_rotary_factor=0.5),
        ),
        "Glm4MoeForCausalLM",
        notes="DeepSeek-V3's routing: sigmoid, correction bias, the best two of four groups, a scaling factor; a "
        "shared expert, the first layer dense",
        seed=1,
    ),
    Family(
        "ernie-moe",
        "Ernie4_5_MoeForCausalLM",
        make(
            Ernie4_5_MoeConfig,
            **dims(112, 4, 2, 133),
            moe_num_experts=10,
            moe_k=3,
            moe_intermediate_size=43,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            tie_word_embeddings=True,
        ),
        "Ernie4_5_MoeForCausalLM",
        scales=Scales(logits=1.6, out=4.0),
        notes="softmax with a correction bias, shared experts, interleaved rotary embedding",
        seed=3,
    ),
    Family(
        "granite-moe",
        "GraniteMoeForCausalLM",
        make(
            GraniteMoeConfig,
            **dims(96, 4, 2, 51),
            num_local_experts=6,
            num_experts_per_tok=2,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.11,
            logits_scaling=1.7,
            tie_word_embeddings=True,
        ),
        "GraniteMoeForCausalLM",
        scales=Scales(logits=3.4, out=130.0),
        notes="softmax over the chosen experts, Granite's multipliers, gate and up packed on disk",
        seed=3,
    ),
    Family(
        "gpt-oss",
        "GptOssForCausalLM",
        make(
            GptOssConfig,
            **dims(96, 4, 2, 42, layers=4),
            head_dim=32,
            num_local_experts=7,
            num_experts_per_tok=2,
            sliding_window=23,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters=rope("yarn", 150000.0, factor=8.0, original_max_position_embeddings=64, **GPT_OSS_YARN),
        ),
        "GptOssForCausalLM",
        scales=Scales(logits=1.6),
        notes="biases, gate and up interleaved and clamped, attention sinks, sliding window in every second layer: two "
        "KV groups",
        seed=2,
    ),
    Family(
        "pangu-pro-moe",
        "PanguProMoEForCausalLM",
        make(
            PanguProMoEReferenceConfig,
            **dims(120, 5, 1, 151),
            num_experts=15,
            num_experts_per_tok=3,
            moe_intermediate_size=37,
            shared_expert_intermediate_size=75,
            rope_parameters=rope(theta=1.6e7),
        ),
        "PanguProMoEForCausalLM",
        reference="paper, float64",
        hub_format=hub_formats.PANGU_PRO_MOE,
        notes="a class of ours; the best expert of each group of five, a scale for each expert, a shared expert; bias "
        "on q, k, v and o",
        seed=1,
    ),
]
