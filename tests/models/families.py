"""The families that are served, each as a tiny random model with the real architecture.

The dimensions are chosen to be awkward on purpose: odd intermediate sizes, GQA ratios from 1 to 7, head sizes from 16
to 128 that are rarely powers of two, a vocabulary that is not a multiple of 64, sliding windows far shorter than the
prompts, scaled rotary embeddings whose scaling already matters at position 64.

`FAMILIES[name].reference` says what a family is compared with:

    hf        Hugging Face's own class, from the same checkpoint
    hf-as X   the hub ships only remote code: the same weights under the names of X, an equivalent in-tree class
    … with Y  the same, with Y added to X in `pangu_models.py`: Hugging Face has no equivalent
    hf+alibi  Hugging Face's class with the ALiBi bias computed in float32 (Falcon's own rounds it to bfloat16), or
              LlamaForCausalLM with rotary switched off and an ALiBi mask (Baichuan 13B)
    paper, float64  no implementation is public that could be installed: one written from the paper, in float64
"""

from collections.abc import Callable
from typing import Any

from transformers import (
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from .family import GEMMA_NORMS, LLAMA3_ROPE, QK_NORMS, Family, Scales, dims, make, rope
from .hub_families import HUB_FAMILIES
from .latent_families import LATENT_FAMILIES
from .moe_families import MOE_FAMILIES
from .pangu_families import PANGU_FAMILIES
from .parallel_families import PARALLEL_FAMILIES
from .sigmoid_moe_families import SIGMOID_MOE_FAMILIES
from .sparse_families import SPARSE_FAMILIES


def _longrope(rotary_dim: int, original: int, partial: float) -> dict[str, Any]:
    half = rotary_dim // 2
    return rope(
        "longrope",
        short_factor=[1.0 + 0.03 * i for i in range(half)],
        long_factor=[1.1 + 0.9 * i for i in range(half)],
        original_max_position_embeddings=original,
        partial_rotary_factor=partial,
    )


def _phi3_longrope(original: int) -> Callable[[], PreTrainedConfig]:
    shape = {**dims(192, 4, 2, 217), "max_position_embeddings": 1024}
    return make(
        Phi3Config, **shape, original_max_position_embeddings=original, rope_parameters=_longrope(36, original, 0.75)
    )


LOCAL, GLOBAL = "sliding_attention", "full_attention"
TIED = Scales(out=4.0)

_LLAMAS = [
    Family("llama2", "LlamaForCausalLM", make(LlamaConfig, **dims(96, 6, 6, 173)), "LlamaForCausalLM", seed=1),
    Family(
        "llama3",
        "LlamaForCausalLM",
        make(LlamaConfig, **dims(160, 5, 1, 301), rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
        "LlamaForCausalLM",
        scales=TIED,
        notes="rope scaling llama3, tied embeddings, GQA 5",
        seed=3,
    ),
    Family(
        "llama-linear",
        "LlamaForCausalLM",
        make(
            LlamaConfig,
            **dims(112, 7, 1, 199),
            rope_parameters=rope("linear", factor=4.0),
            attention_bias=True,
            mlp_bias=True,
        ),
        "LlamaForCausalLM",
        notes="rope scaling linear, every bias Llama can have, GQA 7",
        seed=3,
    ),
    Family(
        "llama-yarn",
        "LlamaForCausalLM",
        make(
            LlamaConfig,
            **dims(192, 3, 1, 333),
            rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=64),
        ),
        "LlamaForCausalLM",
        scales=Scales(qk=1.4),
        notes="rope scaling YaRN",
        seed=2,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        make(MistralConfig, **dims(136, 4, 2, 257), head_dim=40, sliding_window=29),
        "MistralForCausalLM",
        notes="sliding window 29 in every layer; head_dim is not hidden / heads",
        seed=3,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        make(Qwen2Config, **dims(168, 7, 1, 275), rope_parameters=rope(theta=1e6), tie_word_embeddings=True),
        "Qwen2ForCausalLM",
        scales=TIED,
        notes="bias on q, k, v",
        seed=2,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        make(
            Qwen3Config,
            **dims(96, 3, 1, 219),
            head_dim=128,
            rope_parameters=rope(theta=1e6),
            tie_word_embeddings=True,
        ),
        "Qwen3ForCausalLM",
        scales=Scales(out=4.0, norm=QK_NORMS),
        notes="RMSNorm per head on q and k, head_dim 128",
        seed=3,
    ),
    Family("phi3", "Phi3ForCausalLM", make(Phi3Config, **dims(144, 6, 3, 223)), "Phi3ForCausalLM", seed=2),
    Family(
        "phi3-longrope",
        "Phi3ForCausalLM",
        _phi3_longrope(256),
        "Phi3ForCausalLM",
        llm={"max_model_len": 256},
        scales=Scales(qk=1.4),
        notes="max_model_len = original length: vLLM and HF use the short factors; partial rotary 0.75 (Phi-4 mini)",
    ),
    Family(
        "phi3-longrope-long",
        "Phi3ForCausalLM",
        _phi3_longrope(64),
        "Phi3ForCausalLM",
        reference="hf, long factors",
        llm={"max_model_len": 512},
        scales=Scales(qk=1.4),
        notes="max_model_len > original length: vLLM uses the long factors at every position, HF only beyond 64 "
        "tokens; the reference is HF with short_factor = long_factor",
        seed=5,
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        make(
            StableLmConfig,
            **dims(160, 4, 2, 211),
            use_qkv_bias=True,
            rope_parameters=rope(partial_rotary_factor=0.25),
        ),
        "StablelmForCausalLM",
        notes="LayerNorm, rotary on 10 of 40 elements of a head, bias on q, k, v",
        seed=1,
    ),
    Family(
        "glm4",
        "Glm4ForCausalLM",
        make(Glm4Config, **dims(160, 6, 2, 243), head_dim=32, rope_parameters=rope(partial_rotary_factor=0.5)),
        "Glm4ForCausalLM",
        notes="interleaved rotary on half of a head, sandwich norms, bias on q, k, v",
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        make(
            GraniteConfig,
            **dims(176, 4, 1, 201),
            attention_bias=True,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.11,
            logits_scaling=1.7,
            tie_word_embeddings=True,
        ),
        "GraniteForCausalLM",
        scales=Scales(logits=3.4, out=130.0),
        notes="multipliers on embedding, residual, attention and logits",
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        make(Olmo2Config, **dims(144, 6, 2, 257)),
        "TransformersForCausalLM",
        scales=Scales(norm=QK_NORMS),
        notes="vLLM 0.32 has no class of its own: Transformers modeling backend; norms after attention and MLP, "
        "RMSNorm over all heads of q and k",
        seed=1,
    ),
]

_GEMMAS = [
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        make(
            Gemma2Config,
            **dims(144, 6, 3, 185, layers=4),
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=21,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=11.0,
        ),
        "Gemma2ForCausalLM",
        scales=Scales(qk=2.2, norm=GEMMA_NORMS),
        notes="soft caps low enough to bite, sliding window in layers 0 and 2: two KV groups",
        seed=5,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        make(
            Gemma3TextConfig,
            **dims(320, 5, 1, 277, layers=4),
            head_dim=40,
            query_pre_attn_scalar=56,
            sliding_window=25,
            layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL],
            rope_parameters={LOCAL: rope(), GLOBAL: rope("linear", 1e6, factor=8.0)},
        ),
        "Gemma3ForCausalLM",
        scales=Scales(logits=1.6, norm=GEMMA_NORMS | {"q_norm": 1.5, "k_norm": 1.5}),
        notes="two rotary tables, RMSNorm on q and k, sliding window in three layers of four: two KV groups",
        seed=1,
    ),
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        make(
            Exaone4Config,
            **dims(132, 6, 2, 249, layers=4),
            head_dim=32,
            sliding_window=19,
            sliding_window_pattern=4,
            rope_parameters=LLAMA3_ROPE,
        ),
        "Exaone4ForCausalLM",
        scales=Scales(norm=QK_NORMS),
        notes="no rotary in the full-attention layer, norms after attention and MLP: two KV groups",
    ),
]

_GPTS = [
    Family(
        "opt",
        "OPTForCausalLM",
        make(
            OPTConfig,
            hidden_size=120,
            num_attention_heads=5,
            ffn_dim=333,
            num_hidden_layers=3,
            max_position_embeddings=512,
        ),
        "OPTForCausalLM",
        scales=TIED,
        notes="learned positions (offset 2), LayerNorm, ReLU, biases everywhere",
        seed=3,
    ),
    Family(
        "opt-postnorm",
        "OPTForCausalLM",
        make(
            OPTConfig,
            hidden_size=96,
            num_attention_heads=4,
            ffn_dim=301,
            num_hidden_layers=3,
            max_position_embeddings=512,
            word_embed_proj_dim=72,
            do_layer_norm_before=False,
        ),
        "OPTForCausalLM",
        scales=Scales(out=1.0, qk=2.2),
        notes="the shape of opt-350m: norms after the residual, embeddings projected in and out, no final norm",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        make(GPT2Config, n_embd=132, n_head=6, n_inner=301, n_layer=3, n_positions=512),
        "GPT2LMHeadModel",
        scales=TIED,
        notes="learned positions, Conv1D weights on disk, gelu_new, head size 22",
    ),
    Family(
        "falcon-7b",
        "FalconForCausalLM",
        make(FalconConfig, hidden_size=140, num_attention_heads=5, num_hidden_layers=3, max_position_embeddings=512),
        "FalconForCausalLM",
        scales=TIED,
        notes="multi-query, attention and MLP in parallel after one LayerNorm",
        seed=2,
    ),
    Family(
        "falcon-new",
        "FalconForCausalLM",
        make(
            FalconConfig,
            hidden_size=144,
            num_attention_heads=6,
            num_kv_heads=2,
            num_hidden_layers=3,
            new_decoder_architecture=True,
            max_position_embeddings=512,
        ),
        "FalconForCausalLM",
        scales=TIED,
        notes="the decoder of 40B: two LayerNorms before the parallel branches, q, k, v grouped per KV head on disk",
        seed=1,
    ),
    Family(
        "falcon-alibi",
        "FalconForCausalLM",
        make(
            FalconConfig,
            hidden_size=120,
            num_attention_heads=6,
            num_hidden_layers=3,
            multi_query=False,
            parallel_attn=False,
            alibi=True,
            bias=True,
            max_position_embeddings=512,
        ),
        "FalconForCausalLM",
        reference="hf+alibi",
        scales=TIED,
        notes="the shape of rw-1b: ALiBi on 6 heads (not a power of two), sequential blocks, biases everywhere",
        seed=3,
    ),
]

_DENSE = (*_LLAMAS, *_GEMMAS, *_GPTS)
WITH_EXPERTS = (*MOE_FAMILIES, *SIGMOID_MOE_FAMILIES, *PANGU_FAMILIES)
_ALL = (*_DENSE, *LATENT_FAMILIES, *SPARSE_FAMILIES, *HUB_FAMILIES, *WITH_EXPERTS)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
EVERY_FAMILY = {**FAMILIES, **PARALLEL_FAMILIES}
