"""Baichuan and Baichuan 2, 7B and 13B, which vLLM had until 0.23: Llama with three differences.

- q, k and v are one matrix on disk, `W_pack`, with as many KV heads as query heads.
- 13B has ALiBi instead of rotary embedding.
- Baichuan 2 divides every row of its output head by the row's L2 norm, once, when it is loaded.

The hub's configurations do not name the last two. The 7B models are the ones with hidden size 4096, or with the
spelling BaiChuanForCausalLM; Baichuan 2 is the one with a vocabulary of 125696.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

ROTARY_HIDDEN_SIZE = 4096
NORMALIZED_HEAD_VOCABULARY = 125696


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (https://arxiv.org/abs/2108.12409): a geometric sequence from 2^(-8/n) down to 2^-8.

    n is the number of heads if that is a power of two; else the next lower one, and the heads that remain take every
    second slope of the sequence for 2n.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * head / below) for head in range(1, below + 1)]
    between = [2.0 ** (-4.0 * head / below) for head in range(1, 2 * below, 2)]
    return slopes + between[: num_heads - below]


class BaichuanAttention(nn.Module):
    """Multi-head attention with q, k and v in one projection, and rotary embedding or ALiBi."""

    uses_alibi = False

    def __init__(
        self,
        config,
        hidden_size: int,
        num_heads: int,
        max_position_embeddings: int,
        quant_config=None,
        cache_config=None,
        prefix: str = "",
        **_llama_only,
    ):
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        head_size, self.num_heads = hidden_size // num_heads, num_heads // ranks
        self.size = self.num_heads * head_size
        self.W_pack = QKVParallelLinear(
            hidden_size, head_size, num_heads, bias=False, quant_config=quant_config, prefix=f"{prefix}.W_pack"
        )
        self.o_proj = RowParallelLinear(
            hidden_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        slopes = None
        if self.uses_alibi:
            slopes = alibi_slopes(num_heads)[rank * self.num_heads : (rank + 1) * self.num_heads]
        else:
            rope = getattr(config, "rope_parameters", None)
            self.rotary_emb = get_rope(head_size, max_position_embeddings, rope_parameters=rope)
        self.attn = Attention(
            self.num_heads,
            head_size,
            head_size**-0.5,
            alibi_slopes=slopes,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden_size] → [T, hidden_size]."""
        qkv, _ = self.W_pack(hidden_states)
        q, k, v = qkv.split(self.size, dim=-1)
        if not self.uses_alibi:
            q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class BaichuanAlibiAttention(BaichuanAttention):
    """As above, with ALiBi."""

    uses_alibi = True


class BaichuanForCausalLM(LlamaForCausalLM):
    """Baichuan 13B, Baichuan 2 7B and 13B: ALiBi unless the hidden size is that of 7B."""

    packed_modules_mapping = {"W_pack": ["W_pack"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        attention = BaichuanAlibiAttention if self.uses_alibi(vllm_config.model_config.hf_config) else BaichuanAttention
        layer = partial(LlamaDecoderLayer, attn_layer_type=attention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    @staticmethod
    def uses_alibi(config) -> bool:
        """Whether a configuration is that of a 13B model."""
        return config.hidden_size != ROTARY_HIDDEN_SIZE

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors named as in the hub's repositories; see `AutoWeightsLoader`."""
        if self.config.vocab_size == NORMALIZED_HEAD_VOCABULARY:
            weights = _with_normalized_head(weights)
        return super().load_weights(weights)


class BaiChuanForCausalLM(BaichuanForCausalLM):
    """Baichuan 7B: rotary embedding."""

    @staticmethod
    def uses_alibi(config) -> bool:
        """Never: only the first 7B model has this spelling."""
        return False


def _with_normalized_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        yield name, nn.functional.normalize(tensor) if name == "lm_head.weight" else tensor
