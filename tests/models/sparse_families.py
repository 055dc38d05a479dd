"""Families with sparse attention: an indexer selects fewer tokens than the prompts have."""

from transformers import DeepseekV32Config, GlmMoeDsaConfig

from . import moe_formats
from .family import Family, dims, make, rope
from .latent_families import EXPERTS, LATENT, R1_ROPE

SPARSE_FAMILIES = [
    Family(
        "deepseek-v32",
        "DeepseekV32ForCausalLM",
        make(
            DeepseekV32Config,
            **dims(144, 6, 6, 243),
            **{**LATENT, "qk_rope_head_dim": 16},
            **{**EXPERTS, "n_shared_experts": 1},
            kv_lora_rank=40,
            q_lora_rank=36,
            routed_scaling_factor=2.5,
            rope_parameters=R1_ROPE,
            index_topk=33,
            index_n_heads=8,
            index_head_dim=28,
        ),
        "DeepseekV3ForCausalLM",
        reference="hf-as DeepseekV32ForCausalLM",
        hub_format=moe_formats.DEEPSEEK_V32,
        notes="an indexer in every layer, whose rotation is by halves where the layer's is by pairs",
    ),
    Family(
        "glm-moe-dsa",
        "GlmMoeDsaForCausalLM",
        make(
            GlmMoeDsaConfig,
            **dims(128, 4, 4, 221),
            **{**LATENT, "qk_rope_head_dim": 32, "v_head_dim": 36},
            **{**EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
            kv_lora_rank=64,
            q_lora_rank=52,
            routed_scaling_factor=2.5,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            rope_parameters=rope(theta=1e6),
            rms_norm_eps=1e-6,  # the latents' norms of Hugging Face's class have no other
            index_topk=20,
            index_n_heads=11,
            index_head_dim=64,
            index_topk_pattern="FSF",
            indexer_rope_interleave=True,
        ),
        "GlmMoeDsaForCausalLM",
        notes="GLM-5: the layer in between attends to what the first one has selected; sizes for bf16 dot products",
        seed=2,
    ),
]
