"""On-disk formats of families whose hub repositories ship their own (remote) code.

A `HubFormat` turns the weights and configuration of an equivalent Hugging Face class into what such a repository
holds: config.json with its own field names, a configuration file named by `auto_map`, and its own tensor names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

State = dict[str, torch.Tensor]

CONFIGURATION_FILE = """\
from transformers.configuration_utils import PretrainedConfig


class {cls}(PretrainedConfig):
    model_type = "{model_type}"
    attribute_map = {attribute_map!r}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs):
        for name, value in kwargs.items():
            if name in self.fields:
                setattr(self, name, value)
        super().__init__(**{{k: v for k, v in kwargs.items() if k not in self.fields}})

    fields = {fields!r}
"""


@dataclass(frozen=True)
class HubFormat:
    """How one hub repository lays out its checkpoint.

    fields: configuration of the equivalent class -> the fields config.json has beyond the common ones.
    tensors: (state of the equivalent class, its configuration) -> tensors as the repository names them.
    attribute_map: Hugging Face's attribute names -> the repository's, where they differ.
    """

    model_type: str
    config_class: str
    fields: Callable[[PreTrainedConfig], dict[str, Any]]
    tensors: Callable[[State, PreTrainedConfig], State]
    attribute_map: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> str:
        return f"configuration_{self.model_type.lower()}"

    def config_json(self, config: PreTrainedConfig, architecture: str, dtype: str) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": [architecture],
            "auto_map": {"AutoConfig": f"{self.module}.{self.config_class}"},
            "model_type": self.model_type,
            "torch_dtype": dtype,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "tie_word_embeddings": config.tie_word_embeddings,
            **self.fields(config),
        }

    def configuration_file(self, config: PreTrainedConfig) -> str:
        """The source of configuration_*.py, which `trust_remote_code` executes."""
        return CONFIGURATION_FILE.format(
            cls=self.config_class,
            model_type=self.model_type,
            attribute_map=dict(self.attribute_map),
            fields=sorted(self.fields(config)),
        )


def _llama_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields every repository derived from LLaMA has, in the style before Transformers 5."""
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
    )


def rename(state: State, names: dict[str, str]) -> State:
    """Replaces substrings of tensor names, in order."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def pack(state: State, packed_name: str, pack: Callable[..., torch.Tensor]) -> State:
    """Replaces each layer's q_proj, k_proj and v_proj by one tensor called `packed_name`."""
    out = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            q, k, v = (state[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv")
            out[name.replace("q_proj", packed_name)] = pack(q, k, v)
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[name] = tensor
    return out


def _internlm2_tensors(state: State, config: PreTrainedConfig) -> State:
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim

    def group(q, k, v):
        """Rows per KV head: its query heads, then its key, then its value."""
        split = [t.view(kv_heads, -1, head_dim, t.shape[-1]) for t in (q, k, v)]
        return torch.cat(split, dim=1).reshape(-1, q.shape[-1])

    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "self_attn.wqkv": "attention.wqkv",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    return rename(pack(state, "wqkv", group), names)


def _exaone3_tensors(state: State, config: PreTrainedConfig) -> State:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "gate_proj": "c_fc_0",
        "up_proj": "c_fc_1",
        "down_proj": "c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }
    return rename(state, names)


def _exaone3_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = _llama_fields(config)
    scaling = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
    fields |= dict(
        num_layers=fields.pop("num_hidden_layers"),
        layer_norm_epsilon=fields.pop("rms_norm_eps"),
        activation_function=fields.pop("hidden_act"),
        head_dim=config.head_dim,
        rope_scaling=scaling,
    )
    return fields


def _minicpm_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return _llama_fields(config) | dict(
        scale_emb=config.embedding_multiplier,
        scale_depth=config.residual_multiplier * config.num_hidden_layers**0.5,
        dim_model_base=config.hidden_size / config.logits_scaling,
        rope_scaling=None,
    )


_PANGU_EXPERTS = ("num_experts", "num_experts_per_tok", "n_group", "moe_intermediate_size",
                  "shared_expert_intermediate_size", "mlp_only_layers")  # fmt: skip

INTERNLM2 = HubFormat(
    "internlm2",
    "InternLM2Config",
    lambda c: _llama_fields(c) | dict(bias=False, rope_scaling={"type": "dynamic", "factor": 2.0}),
    _internlm2_tensors,
)
INTERNLM3 = HubFormat(
    "internlm3",
    "InternLM3Config",
    lambda c: (
        _llama_fields(c)
        | dict(bias=False, qkv_bias=True, head_dim=c.head_dim, rope_scaling={"rope_type": "dynamic", "factor": 6.0})
    ),
    lambda state, config: state,
)
MINICPM = HubFormat("minicpm", "MiniCPMConfig", _minicpm_fields, lambda state, config: state)
EXAONE3 = HubFormat(
    "exaone",
    "ExaoneConfig",
    _exaone3_fields,
    _exaone3_tensors,
    (("num_hidden_layers", "num_layers"),),
)
PANGU_PRO_MOE = HubFormat(
    "PanguProMoE",
    "PanguProMoEConfig",
    lambda c: _llama_fields(c) | {name: getattr(c, name) for name in _PANGU_EXPERTS if getattr(c, name) is not None},
    lambda state, config: state,
)
PANGU_EMBEDDED = HubFormat(
    "PanguEmbedded",
    "PanguEmbeddedConfig",
    lambda c: _llama_fields(c) | dict(bias=True, head_dim=c.head_dim),
    lambda state, config: state,
)
BAICHUAN = HubFormat(
    "baichuan",
    "BaiChuanConfig",
    _llama_fields,
    lambda state, config: pack(state, "W_pack", lambda q, k, v: torch.cat([q, k, v])),
)
