"""What describes one test family, and the building blocks of its configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from .hub_formats import HubFormat

TOKENIZER_SIZE = 1000
VOCAB_SIZE = 1003
EOS_TOKEN_ID = 2
# Means of the weights of norms that make the greedy text diverse, for `Scales.norm`.
QK_NORMS = {"q_norm": 1.7, "k_norm": 1.7}
GEMMA_NORMS = {"post_attention": 20.0, "post_feedforward": 20.0}


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the random weights, chosen so that greedy text is diverse (see test_checkpoints.py).

    logits: standard deviation of the logits when the final hidden state has RMS 1 (divided out of lm_head).
    linear, qk, out: gains of linear layers over 1/sqrt(fan_in): the default, of q and k, of o and down projections.
    norm: mean of the weights of norms, by substring of the parameter's name, where it is not 1.
    """

    logits: float = 2.0
    linear: float = 1.2
    qk: float = 1.7
    out: float = 1.5
    norm: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family: how to make its checkpoint, how vLLM must resolve it, what it is compared with.

    config: builds the configuration of the *reference* class. With `hub_format`, the checkpoint on disk gets the
    family's own configuration and tensor names instead, and the reference's are kept in its subfolder `reference`.
    vllm_class: the class vLLM resolves `architecture` to: its own, or one that `vllm_mindspore.models` registers.
    llm: extra arguments of `vllm.LLM`.
    """

    name: str
    architecture: str
    config: Callable[..., PreTrainedConfig]
    vllm_class: str
    reference: str = "hf"
    hub_format: HubFormat | None = None
    llm: Mapping[str, Any] = field(default_factory=dict)
    scales: Scales = Scales()
    seed: int = 0
    notes: str = ""


def make(cls: type[PreTrainedConfig], **fields) -> Callable[..., PreTrainedConfig]:
    """A factory of `cls` with the token ids all families share. It takes fields that another family changes."""
    common = dict(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=EOS_TOKEN_ID, pad_token_id=0)
    model_type = cls.model_type

    def config(**changed) -> PreTrainedConfig:
        cls.model_type = model_type  # vLLM gives Kimi K2's to the class of DeepSeek V3
        return cls(**{**common, **fields, **changed})

    return config


def dims(hidden: int, heads: int, kv_heads: int, intermediate: int, layers: int = 3, **more) -> dict[str, Any]:
    return dict(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        **more,
    )


def rope(rope_type: str = "default", theta: float = 10000.0, **more) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta, **more}


LLAMA3_ROPE = rope(
    "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
