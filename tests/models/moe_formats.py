"""On-disk formats of families with experts whose repositories hold a tensor for each expert: see `hub_formats.py`."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .hub_formats import HubFormat, State, pack, rename


def expert_by_expert(state: State) -> State:
    """Takes a layer's experts apart: gate_up_proj [experts, 2 * size, hidden], down_proj [experts, hidden, size]."""
    out = {}
    for name, tensor in state.items():
        prefix, packed, part = name.rpartition(".experts.")
        if packed and part in ("gate_up_proj", "down_proj"):
            for expert, weight in enumerate(tensor):
                parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
                for projection, rows in (parts if part == "gate_up_proj" else {part: weight}).items():
                    out[f"{prefix}.experts.{expert}.{projection}.weight"] = rows
        else:
            out[name] = tensor
    return out


def _with_draft_layer(state: State, config: PreTrainedConfig) -> State:
    """Adds the layer that predicts one token more (speculative decoding), with values that no output may show."""
    last, draft = (f"model.layers.{config.num_hidden_layers - i}." for i in (1, 0))
    tensors = expert_by_expert(state)
    copies = {name.replace(last, draft): 3 * tensor for name, tensor in tensors.items() if name.startswith(last)}
    norm, head = state["model.norm.weight"], state["lm_head.weight"]
    extra = {"enorm.weight": norm, "hnorm.weight": norm, "eh_proj.weight": norm.new_ones(len(norm), 2 * len(norm))}
    extra |= {"shared_head.norm.weight": norm, "shared_head.head.weight": head, "embed_tokens.weight": head}
    return tensors | copies | {draft + name: tensor.clone() for name, tensor in extra.items()}


def _fields(config: PreTrainedConfig, names: str, **more: Any) -> dict[str, Any]:
    """The fields `names` of a configuration as they are, those of every model, and `more`."""
    common = "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    common += "num_key_value_heads num_experts_per_tok hidden_act max_position_embeddings rms_norm_eps norm_topk_prob "
    fields = {name: getattr(config, name) for name in (common + names).split()}
    return fields | {"rope_theta": config.rope_parameters["rope_theta"]} | more


LATENT = "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
EXPERTS = "n_routed_experts n_shared_experts routed_scaling_factor first_k_dense_replace "


def _deepseek_fields(config: PreTrainedConfig) -> dict[str, Any]:
    scaling = {name: value for name, value in config.rope_parameters.items() if name not in ("rope_theta", "rope_type")}
    return _fields(
        config,
        LATENT + EXPERTS + "n_group topk_group attention_bias",
        num_nextn_predict_layers=getattr(config, "num_nextn_predict_layers", 0),
        rope_scaling={**scaling, "type": "yarn"},
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        moe_layer_freq=1,
    )


def _sparse_fields(config: PreTrainedConfig) -> dict[str, Any]:
    indexer = {name: getattr(config, name) for name in ("index_topk", "index_n_heads", "index_head_dim")}
    return _deepseek_fields(config) | indexer | {"num_nextn_predict_layers": 1}


def _axk1_tensors(state: State, config: PreTrainedConfig) -> State:
    """The norm after experts beside those of the layer, also in layers without experts, which do not use it."""
    tensors = rename(expert_by_expert(state), {"mlp.post_mlp_layernorm": "post_mlp_layernorm"})
    unused = [f"model.layers.{i}.post_mlp_layernorm.weight" for i in range(config.first_k_dense_replace)]
    return tensors | {name: state["model.norm.weight"].clone() for name in unused}


def _ling2_tensors(state: State, config: PreTrainedConfig) -> State:
    names = {
        "embed_tokens": "word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "self_attn": "attention",
        "e_score_correction_bias": "expert_bias",
    }
    return rename(pack(expert_by_expert(state), "query_key_value", lambda q, k, v: torch.cat([q, k, v])), names)


def _ling2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _fields(
        config,
        "head_dim n_group topk_group routed_scaling_factor first_k_dense_replace use_qk_norm",
        partial_rotary_factor=config.rope_parameters["partial_rotary_factor"],
        num_experts=config.n_routed_experts,
        num_shared_experts=config.n_shared_experts,
        moe_router_enable_expert_bias=True,
        score_function="sigmoid",
        router_dtype="fp32",
        use_rmsnorm=True,
        use_bias=False,
        use_qkv_bias=False,
        norm_head=False,
        embedding_dropout=0.0,
        output_dropout=0.0,
        num_nextn_predict_layers=0,
    )


def _pangu_tensors(state: State, config: PreTrainedConfig) -> State:
    return rename(expert_by_expert(state), {"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"})


def _pangu_fields(config: PreTrainedConfig, names: str) -> dict[str, Any]:
    return _fields(config, EXPERTS + names, sandwich_norm=True, router_enable_expert_bias=True)


DEEPSEEK_V3 = HubFormat("deepseek_v3", "DeepseekV3Config", _deepseek_fields, _with_draft_layer)
DEEPSEEK_V32 = HubFormat("deepseek_v32", "DeepseekV32Config", _sparse_fields, _with_draft_layer)
AXK1 = HubFormat("axk1", "AXK1Config", _deepseek_fields, _axk1_tensors)
KIMI_K2 = HubFormat("kimi_k2", "DeepseekV3Config", _deepseek_fields, lambda state, config: expert_by_expert(state))
LING2 = HubFormat("bailing_moe_v2", "BailingMoeV2Config", _ling2_fields, _ling2_tensors)
PANGU_ULTRA_MOE = HubFormat(
    "pangu_ultra_moe", "PanguUltraMoEConfig", lambda config: _pangu_fields(config, LATENT), _pangu_tensors
)
PANGU_PRO_MOE_V2 = HubFormat(
    "PanguProMoE",
    "PanguProMoEConfig",
    lambda config: _pangu_fields(config, "qk_nope_dim qk_rope_dim v_channels param_sink_number param_sink_with_value"),
    _pangu_tensors,
)
