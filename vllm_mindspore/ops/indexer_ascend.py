"""The lightning indexer on Ascend: a cell of MindSpore's primitives. Checked by export, never run by our tests.

The primitive LightningIndexer scores and selects. It lists positions by score, not ascending, which attention does not
mind. The cache may be [num_blocks, block_size, 1, head_dim], as the primitives take it (preferred), or
[num_slots, 1, head_dim]; bfloat16 or float16. The primitive has limits of its own (head_dim 128, 64 heads, 2048
positions), which the checkpoints of DeepSeek V3.2 and GLM-5 keep.
"""

from __future__ import annotations

from mindspore import float32 as ms_float32
from mindspore import int32 as ms_int32
from mindspore import nn, ops
from mindspore.ops.auto_generate import gen_ops_prim as prim

from vllm_mindspore.ops.ascend import LayerNorm
from vllm_mindspore.ops.attention_ascend import Rotary, blocked

_CAUSAL = 3  # sparse_mode


class LightningIndexer(nn.Cell):
    """query [T, num_heads * head_dim], key_weights [T, head_dim + num_heads]; result [T, top_k] float32."""

    def __init__(self, given, num_heads, head_dim, rope_dim, top_k, neox, norm_eps, block_size):
        super().__init__()
        self.num_heads, self.head_dim, self.top_k, self.block_size = num_heads, head_dim, top_k, block_size
        self.norm = LayerNorm(("x", "weight", "bias"), norm_eps)
        self.rotary = Rotary((), head_dim, rope_dim, neox)
        self.write = prim.ReshapeAndCache()
        self.select = prim.LightningIndexer()

    def construct(self, query, key_weights, positions, cos_sin, key_norm, key_norm_bias, kv_cache, slot_mapping,
                  block_table, query_start_loc, seq_lens):  # fmt: skip
        tokens = query.shape[0]
        cache = blocked(kv_cache, self.block_size)
        key = self.norm(key_weights[:, : self.head_dim], key_norm, key_norm_bias)
        key = ops.cast(self.rotary(positions, key, cos_sin), cache.dtype)
        written = self.write(key, None, cache, None, ops.cast(slot_mapping, ms_int32))
        cache = ops.depend(cache, written)
        heads = ops.reshape(self.rotary(positions, query, cos_sin), (tokens, self.num_heads, self.head_dim))
        weights = key_weights[:, self.head_dim :]
        found = self.select(
            ops.cast(heads, cache.dtype), cache, ops.cast(weights, cache.dtype), query_start_loc[1:], seq_lens,
            block_table, "TND", "PA_BSND", self.top_k, _CAUSAL,
        )  # fmt: skip
        return ops.cast(ops.reshape(found[0], (tokens, self.top_k)), ms_float32)
