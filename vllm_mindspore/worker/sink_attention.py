"""Attention of which every token also sees learned keys and values ("static sinks"), the same for all requests.

vLLM's layer writes them once, with a kernel for GPUs, into blocks that it puts before those of every request, and that
requests may be given as well. Here they are a weight that the attention operator reads.
"""

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.static_sink_attention import StaticSinkAttention

from vllm_mindspore.config import UnsupportedOptionError


class MindSporeStaticSinkAttention(StaticSinkAttention):
    """vLLM's layer on this platform's attention; the sinks are `sink_kv`, rows like those of the KV cache."""

    def __init__(self, num_heads: int, head_size: int, scale: float, sink_len: int, attn_backend=None, **kwargs):
        Attention.__init__(self, num_heads, head_size, scale, **kwargs)  # of the platform's own backend
        if self.sliding_window or self.impl.alibi_slopes is not None:
            raise UnsupportedOptionError(
                f"the attention sinks of {self.layer_name}",
                f"a sliding window of {self.sliding_window}" if self.sliding_window else "ALiBi",
                "learned keys and values beside full attention",
                "Use another model.",
            )
        self.sink_len = sink_len
        rows = torch.zeros(sink_len, self.num_kv_heads, head_size + self.head_size_v, dtype=self.kv_cache_torch_dtype)
        self.register_buffer("sink_kv", rows, persistent=False)

    def update_sink_kv(self, sink_key: torch.Tensor, sink_value: torch.Tensor) -> None:
        """Take over the sinks: [sink_len, num_kv_heads, head_size] and [sink_len, num_kv_heads, head_size_v].

        vLLM's models call this when they are made and after each loading of weights. The graph reads the same memory.
        """
        self.sink_kv[..., : self.head_size] = sink_key.detach()
        self.sink_kv[..., self.head_size :] = sink_value.detach()

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return Attention.forward(self, *args, **kwargs)

    def get_kv_cache_spec(self, vllm_config):
        """That of full attention: the sinks are not in the cache."""
        return Attention.get_kv_cache_spec(self, vllm_config)


REPLACEMENTS = {"StaticSinkAttention": MindSporeStaticSinkAttention}
