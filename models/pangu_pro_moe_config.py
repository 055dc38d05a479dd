"""The configuration of Pangu Pro MoE, which neither Transformers nor vLLM has: it needs no code of the checkpoint.

The fields, and their values where config.json has none, are those of the checkpoint. Another architecture has the same
model type (vLLM's `PanguProMoEV2ForCausalLM`): its configurations keep the fields they come with, and get none of ours.
"""

from typing import Any

from transformers import PreTrainedConfig

ARCHITECTURE = "PanguProMoEForCausalLM"
EXPERTS: dict[str, Any] = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "n_group": None,  # one expert of each group for a token
    "moe_intermediate_size": 1344,
    "shared_expert_intermediate_size": 5376,
}


class PanguProMoEConfig(PreTrainedConfig):
    """Beside what is declared here it has the fields `EXPERTS`; n_group: how many groups the experts form."""

    model_type = "PanguProMoE"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 153376
    hidden_size: int = 5120
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 16000000.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if ARCHITECTURE in (self.architectures or [ARCHITECTURE]):
            kwargs = EXPERTS | kwargs
        super().__post_init__(**kwargs)
