"""Families for several ranks: as `families.py`, with heads and sizes that 2 and 4 ranks can share.

Seeds are such that the two best logits never lie closer than 1e-4: ranks add in another order than one process does.
"""

from dataclasses import replace
from functools import partial

from transformers import (
    DeepseekV3Config,
    DeepseekV32Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from . import hub_formats
from .family import GEMMA_NORMS, LLAMA3_ROPE, QK_NORMS, Family, Scales, dims, make, rope
from .moe_families import GPT_OSS_YARN
from .pangu_reference import PanguProMoEReferenceConfig
from .sigmoid_moe_families import SIGMOID_MOE_FAMILIES

MINIMAX_M2 = next(family for family in SIGMOID_MOE_FAMILIES if family.name == "minimax-m2")

_PARALLEL = [
    Family(
        "parallel-llama",
        "LlamaForCausalLM",
        make(LlamaConfig, **dims(120, 4, 4, 172), rope_parameters=LLAMA3_ROPE),
        "LlamaForCausalLM",
        notes="a head of the output that is its own",
    ),
    Family(
        "parallel-qwen3",
        "Qwen3ForCausalLM",
        make(
            Qwen3Config,
            **dims(104, 4, 2, 236),
            head_dim=32,
            rope_parameters=rope(theta=1e6),
            tie_word_embeddings=True,
        ),
        "Qwen3ForCausalLM",
        scales=Scales(out=4.0, norm=QK_NORMS),
        notes="tied embeddings; 4 ranks share 2 heads of keys",
    ),
    Family(
        "parallel-qwen3-moe",
        "Qwen3MoeForCausalLM",
        make(
            Qwen3MoeConfig,
            **dims(112, 4, 2, 152),
            head_dim=32,
            num_experts=11,
            num_experts_per_tok=3,
            moe_intermediate_size=44,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            rope_parameters=rope(theta=1e6),
        ),
        "Qwen3MoeForCausalLM",
        scales=Scales(norm=QK_NORMS),
        notes="experts in parts",
    ),
    Family(
        "parallel-deepseek-v3",
        "DeepseekV3ForCausalLM",
        make(
            DeepseekV3Config,
            **dims(144, 4, 4, 244),
            kv_lora_rank=40,
            q_lora_rank=36,
            qk_nope_head_dim=24,
            qk_rope_head_dim=16,
            v_head_dim=20,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        "DeepseekV3ForCausalLM",
        notes="latent attention, whose cache every rank has whole; shared experts in parts",
    ),
    Family(
        "parallel-deepseek-v32",
        "DeepseekV32ForCausalLM",
        make(
            DeepseekV32Config,
            **dims(144, 4, 4, 244),
            kv_lora_rank=40,
            q_lora_rank=36,
            qk_nope_head_dim=24,
            qk_rope_head_dim=16,
            v_head_dim=20,
            n_routed_experts=12,
            n_shared_experts=1,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            index_topk=33,
            index_n_heads=7,
            index_head_dim=28,
        ),
        "DeepseekV3ForCausalLM",
        notes="every rank has the whole indexer, whose number of heads they could not share",
    ),
    Family(
        "parallel-gpt-oss",
        "GptOssForCausalLM",
        make(
            GptOssConfig,
            **dims(96, 8, 4, 64, layers=4),
            head_dim=16,
            num_local_experts=7,
            num_experts_per_tok=2,
            sliding_window=23,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters=rope("yarn", 150000.0, factor=8.0, original_max_position_embeddings=64, **GPT_OSS_YARN),
        ),
        "GptOssForCausalLM",
        scales=Scales(logits=1.6),
        notes="biases, of which one rank adds those of the output; sinks of each rank's heads",
    ),
    Family(
        "parallel-gemma3",
        "Gemma3ForCausalLM",
        make(
            Gemma3TextConfig,
            **dims(120, 4, 2, 172, layers=4),
            head_dim=32,
            query_pre_attn_scalar=40,
            sliding_window=25,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"sliding_attention": rope(), "full_attention": rope("linear", 1e6, factor=8.0)},
        ),
        "Gemma3ForCausalLM",
        scales=Scales(logits=1.6, norm=GEMMA_NORMS | {"q_norm": 1.5, "k_norm": 1.5}),
        notes="the first of two stages, alone, would put its layers into one KV cache group",
    ),
    Family(
        "parallel-pangu-pro-moe",
        "PanguProMoEForCausalLM",
        make(
            PanguProMoEReferenceConfig,
            **dims(112, 4, 2, 152),
            num_experts=20,
            num_experts_per_tok=8,
            n_group=4,
            moe_intermediate_size=44,
            shared_expert_intermediate_size=76,
            mlp_only_layers=[1],
            rope_parameters=rope(theta=1.6e7),
        ),
        "PanguProMoEForCausalLM",
        reference="paper, float64",
        hub_format=hub_formats.PANGU_PRO_MOE,
        notes="two experts of each of four groups, so that 2 and 4 ranks hold whole groups; a dense layer between",
        seed=1,
    ),
    replace(
        MINIMAX_M2,
        name="parallel-minimax-m2",
        config=partial(MINIMAX_M2.config, num_key_value_heads=4, intermediate_size=44),
        notes="norms over the heads of all ranks",
    ),
]

PARALLEL_FAMILIES: dict[str, Family] = {family.name: family for family in _PARALLEL}
