"""Families whose hub repositories ship remote code: written in their own format, compared through another class."""

from transformers import GraniteConfig, LlamaConfig, Qwen2Config

from . import hub_formats
from .family import LLAMA3_ROPE, Family, Scales, dims, make, rope

REMOTE = {"trust_remote_code": True}

HUB_FAMILIES = [
    Family(
        "internlm2",
        "InternLM2ForCausalLM",
        make(LlamaConfig, **dims(168, 6, 2, 229), rope_parameters=rope(theta=1e6)),
        "InternLM2ForCausalLM",
        reference="hf-as LlamaForCausalLM",
        hub_format=hub_formats.INTERNLM2,
        llm=REMOTE,
        notes="wqkv grouped per KV head; dynamic NTK rope on disk, which both leave unscaled up to 512 positions",
        seed=5,
    ),
    Family(
        "internlm3",
        "InternLM3ForCausalLM",
        make(Qwen2Config, **dims(144, 6, 2, 231), head_dim=32),
        "LlamaForCausalLM",
        reference="hf-as Qwen2ForCausalLM",
        hub_format=hub_formats.INTERNLM3,
        llm=REMOTE,
        notes="vLLM's Llama with qkv_bias; dynamic NTK rope as InternLM 2",
        seed=5,
    ),
    Family(
        "minicpm",
        "MiniCPMForCausalLM",
        make(
            GraniteConfig,
            **dims(108, 3, 3, 263),
            embedding_multiplier=12.0,
            residual_multiplier=1.4 / 3**0.5,
            attention_multiplier=36**-0.5,
            logits_scaling=108 / 54,
            tie_word_embeddings=True,
        ),
        "MiniCPMForCausalLM",
        reference="hf-as GraniteForCausalLM",
        hub_format=hub_formats.MINICPM,
        llm=REMOTE,
        scales=Scales(logits=4.0, out=40.0),
        notes="scale_emb 12, scale_depth 1.4, dim_model_base 54",
        seed=5,
    ),
    Family(
        "exaone3",
        "ExaoneForCausalLM",
        make(LlamaConfig, **dims(160, 5, 1, 239), rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5),
        "ExaoneForCausalLM",
        reference="hf-as LlamaForCausalLM",
        hub_format=hub_formats.EXAONE3,
        llm=REMOTE,
        seed=5,
    ),
    Family(
        "pangu-embedded",
        "PanguEmbeddedForCausalLM",
        make(LlamaConfig, **dims(152, 4, 1, 255), rope_parameters=rope(theta=1.6e7), attention_bias=True),
        "PanguEmbeddedForCausalLM",
        reference="hf-as LlamaForCausalLM",
        hub_format=hub_formats.PANGU_EMBEDDED,
        llm=REMOTE,
        notes="bias on q, k, v and o",
        seed=4,
    ),
    Family(
        "baichuan-7b",
        "BaiChuanForCausalLM",
        make(LlamaConfig, **dims(128, 4, 4, 245)),
        "BaiChuanForCausalLM",
        reference="hf-as LlamaForCausalLM",
        hub_format=hub_formats.BAICHUAN,
        llm=REMOTE,
        notes="a class of ours; q, k, v packed in W_pack",
        seed=2,
    ),
    Family(
        "baichuan-13b",
        "BaichuanForCausalLM",
        make(LlamaConfig, **dims(120, 5, 5, 247)),
        "BaichuanForCausalLM",
        reference="hf+alibi",
        hub_format=hub_formats.BAICHUAN,
        llm=REMOTE,
        notes="a class of ours; ALiBi on 5 heads instead of rotary",
        seed=1,
    ),
]
