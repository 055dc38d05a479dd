"""Families with multi-head latent attention, dense and with experts, as tiny random models."""

from transformers import AXK1Config, DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

from . import moe_formats
from .family import Family, dims, make, rope

DENSE = dict(n_routed_experts=0, first_k_dense_replace=3)  # every layer
EXPERTS = dict(
    n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, moe_intermediate_size=41, n_shared_experts=2,
    first_k_dense_replace=1,
)  # fmt: skip
LATENT = dict(qk_nope_head_dim=20, qk_rope_head_dim=12, v_head_dim=28)
DEEPSEEK_ROPE = rope(
    "yarn", factor=8.0, original_max_position_embeddings=64, mscale=0.9, mscale_all_dim=0.7, beta_fast=32, beta_slow=1
)
# Kimi K2 and A.X K1: as DeepSeek V3, without groups of experts
UNGROUPED = {**EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
R1_ROPE = {**DEEPSEEK_ROPE, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
KIMI_ROPE = {**R1_ROPE, "factor": 32.0, "beta_fast": 1.0, "rope_theta": 50000.0}

LATENT_FAMILIES = [
    Family(
        "deepseek-v2-lite",
        "DeepseekV2ForCausalLM",
        make(DeepseekV2Config, **dims(120, 5, 5, 231), **LATENT, **DENSE, kv_lora_rank=48, q_lora_rank=None),
        "DeepseekV2ForCausalLM",
        notes="multi-head latent attention, queries projected at once, 5 heads",
    ),
    Family(
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        make(
            DeepseekV2Config,
            **dims(136, 4, 4, 219),
            **{**LATENT, "qk_rope_head_dim": 32},
            **DENSE,
            kv_lora_rank=64,
            q_lora_rank=52,
        ),
        "DeepseekV2ForCausalLM",
        notes="multi-head latent attention, queries through a latent of their own; sizes that bf16 dot products take",
    ),
    Family(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        make(
            DeepseekV3Config,
            **dims(144, 6, 6, 243),
            **{**LATENT, "qk_rope_head_dim": 16, "v_head_dim": 20},
            **DENSE,
            kv_lora_rank=40,
            q_lora_rank=36,
            rope_parameters=DEEPSEEK_ROPE,
        ),
        "DeepseekV3ForCausalLM",
        notes="multi-head latent attention with DeepSeek's YaRN, whose scale enters rotary table and softmax",
    ),
    Family(
        "deepseek-v2-moe",
        "DeepseekV2ForCausalLM",
        make(
            DeepseekV2Config,
            **dims(120, 5, 5, 231),
            **LATENT,
            **EXPERTS,
            kv_lora_rank=48,
            q_lora_rank=None,
            topk_method="group_limited_greedy",
            routed_scaling_factor=1.5,
        ),
        "DeepseekV2ForCausalLM",
        notes="latent attention and experts: softmax, the best two of four groups, two shared experts",
        seed=1,  # with 0, bf16 decides a tie of experts the other way
    ),
    Family(
        "deepseek-v3-moe",
        "DeepseekV3ForCausalLM",
        make(
            DeepseekV3Config,
            **dims(144, 6, 6, 243),
            **{**LATENT, "qk_rope_head_dim": 16, "v_head_dim": 20},
            **EXPERTS,
            kv_lora_rank=40,
            q_lora_rank=36,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        "DeepseekV3ForCausalLM",
        notes="latent attention and experts: sigmoid, correction bias, the best two of four groups",
    ),
    Family(
        "deepseek-r1",
        "DeepseekV3ForCausalLM",
        make(
            DeepseekV3Config,
            **dims(128, 4, 4, 221),
            **LATENT,
            **EXPERTS,
            kv_lora_rank=44,
            q_lora_rank=36,
            routed_scaling_factor=2.5,
            rope_parameters=R1_ROPE,
        ),
        "DeepseekV3ForCausalLM",
        reference="hf-as DeepseekV3ForCausalLM",
        hub_format=moe_formats.DEEPSEEK_V3,
        notes="V3, R1 and V3.1 as their repositories hold them: `rope_scaling` of type yarn whose mscale leaves the "
        "table alone and scales the softmax, a tensor per expert, the layer of a draft model after the last",
    ),
    Family(
        "kimi-k2",
        "DeepseekV3ForCausalLM",
        make(
            DeepseekV3Config,
            **dims(136, 4, 4, 237),
            **{**LATENT, "qk_nope_head_dim": 24},
            **UNGROUPED,
            kv_lora_rank=52,
            q_lora_rank=44,
            routed_scaling_factor=2.827,
            rope_parameters=KIMI_ROPE,
            num_mtp_layers=0,
        ),
        "DeepseekV3ForCausalLM",
        reference="hf-as DeepseekV3ForCausalLM",
        hub_format=moe_formats.KIMI_K2,
        notes="DeepSeek V3 with one group of experts, half as many heads, and a yarn whose two bounds are equal",
    ),
    Family(
        "glm4-moe-lite",
        "Glm4MoeLiteForCausalLM",
        make(
            Glm4MoeLiteConfig,
            **dims(120, 5, 5, 227),
            **{**LATENT, "v_head_dim": 36},
            n_routed_experts=11,
            num_experts_per_tok=4,
            moe_intermediate_size=43,
            first_k_dense_replace=1,  # read by vLLM's class only
            kv_lora_rank=48,
            q_lora_rank=40,
            rms_norm_eps=1e-6,
        ),
        "Glm4MoeLiteForCausalLM",
        notes="the shape of GLM-4.7 Flash: latent attention with wide values, one group of experts",
        seed=2,
    ),
    Family(
        "axk1",
        "AXK1ForCausalLM",
        make(
            AXK1Config,
            **dims(112, 4, 4, 213),
            **LATENT,
            **UNGROUPED,
            kv_lora_rank=44,
            q_lora_rank=36,
            rope_parameters=DEEPSEEK_ROPE,
        ),
        "AXK1ForCausalLM",
        reference="hf-as AXK1ForCausalLM",
        hub_format=moe_formats.AXK1,
        notes="A.X K1: DeepSeek V3 with a norm after experts",
    ),
]
