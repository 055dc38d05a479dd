"""Rotary, KV cache and attention on Ascend: cells of MindSpore's primitives. Checked by export, never run by our tests.

Our cache keeps the key and the value of a slot side by side, MindSpore's primitives want them as two tensors. So a row
of both is written as one long key, and attention runs with queries extended by zeros against that row as both key and
value; the end of its result, as long as a value, is the answer. Exact, at twice the arithmetic of separate caches.

The cache may be [num_blocks, block_size, num_kv_heads, head_size + value_size], as the primitives take it (preferred:
writing in place does not then depend on a reshape being a view), or with one dimension of slots instead. bfloat16 or
float16; the primitives refuse float32. A context must fit the primitives' own limits (head size, block size).
"""

from __future__ import annotations

from mindspore import float32 as ms_float32
from mindspore import int32 as ms_int32
from mindspore import nn, ops
from mindspore.ops.auto_generate import gen_ops_prim as prim

from vllm_mindspore.ops.ascend import RmsNorm
from vllm_mindspore.ops.operator import UnsupportedOperator


def blocked(cache, block_size):
    """The cache as [num_blocks, block_size, num_kv_heads, width]."""
    if cache.ndim == 4:
        return cache
    return ops.reshape(cache, (-1, block_size, cache.shape[-2], cache.shape[-1]))


class Rotary(nn.Cell):
    """positions [T], x [T, heads * head_size] or [T, heads, head_size], cos_sin [P, rotary_dim]."""

    def __init__(self, given, head_size, rotary_dim, neox):
        super().__init__()
        self.head_size = head_size
        self.rotary_dim = rotary_dim
        self.neox = neox
        self.mode = 0 if neox else 1
        self.gather = prim.Gather()
        self.rotate = prim.RotaryPositionEmbedding()

    def table(self, part):
        """[T, rotary_dim / 2] to [1, T, 1, rotary_dim], each value at both elements of its pair."""
        both = ops.concat((part, part), -1) if self.neox else ops.stack((part, part), -1)
        return ops.reshape(both, (1, -1, 1, self.rotary_dim))

    def construct(self, positions, x, cos_sin):
        half = self.rotary_dim // 2
        rows = ops.cast(self.gather(cos_sin, positions, 0), ms_float32)
        cos, sin = self.table(rows[:, :half]), self.table(rows[:, half:])
        heads = ops.reshape(x, (1, positions.shape[0], -1, self.head_size))
        if self.rotary_dim == self.head_size:
            out = self.rotate(heads, cos, sin, self.mode)
        else:
            rotated = self.rotate(heads[..., : self.rotary_dim], cos, sin, self.mode)
            out = ops.concat((rotated, heads[..., self.rotary_dim :]), -1)
        return ops.reshape(out, x.shape)


class KvWrite(nn.Cell):
    """kv_cache, key and value [T, num_kv_heads * head_size] or rank 3, slot_mapping [T]."""

    def __init__(self, given):
        super().__init__()
        self.write = prim.ReshapeAndCache()

    def construct(self, kv_cache, key, value, slot_mapping):
        cache = blocked(kv_cache, 1)
        heads, width = cache.shape[-2], cache.shape[-1]
        shape = (slot_mapping.shape[0], heads, -1)
        rows = ops.concat((ops.reshape(key, shape), ops.reshape(value, shape)), -1)
        rows = ops.cast(ops.reshape(rows, (shape[0], heads * width)), cache.dtype)
        return self.write(rows, None, cache, None, ops.cast(slot_mapping, ms_int32))


class PagedAttention(nn.Cell):
    """query [T, num_heads * head_size] or rank 3; result [T, num_heads * value_size]."""

    def __init__(self, given, num_heads, num_kv_heads, head_size, scale, block_size, sliding_window, soft_cap):
        super().__init__()
        used = {
            "sliding_window": sliding_window > 0,
            "soft_cap": soft_cap > 0,
            "sinks": "sinks" in given,
            "alibi_slopes": "alibi_slopes" in given,
            "sink_kv": "sink_kv" in given,
        }
        for name, value in used.items():
            if value:
                message = f"attention on ascend: {name} has no counterpart in MindSpore's PagedAttention"
                raise UnsupportedOperator(message)
        self.num_heads = num_heads
        self.head_size = head_size
        self.block_size = block_size
        self.attend = prim.PagedAttention(num_heads, scale, num_kv_heads, mask_mode="TRAPEZOIDAL")  # causal

    def construct(self, query, kv_cache, block_table, query_start_loc, seq_lens):
        tokens = query.shape[0]
        cache = blocked(kv_cache, self.block_size)
        heads = ops.cast(ops.reshape(query, (tokens, self.num_heads, self.head_size)), cache.dtype)
        width = cache.shape[-1]
        zeros = ops.zeros_like(heads[..., : width - self.head_size])  # values are not wider than keys
        extended = ops.reshape(ops.concat((heads, zeros), -1), (tokens, -1))
        query_lens = query_start_loc[1:] - query_start_loc[:-1]
        out = self.attend(extended, cache, cache, block_table, seq_lens, None, None, None, query_lens, None)
        out = ops.reshape(out, (tokens, self.num_heads, width))[..., self.head_size :]
        out = ops.cast(ops.reshape(out, (tokens, self.num_heads * (width - self.head_size))), ms_float32)
        owned = ops.expand_dims(ops.arange(tokens) < query_start_loc[-1], -1)
        return ops.select(owned, out, ops.zeros_like(out))  # tokens of no request


class QkvAttention(nn.Cell):
    """Norm, rotation, writing and attention, from the cells above."""

    def __init__(self, given, num_heads, num_kv_heads, head_size, rotary_dim, neox, norm_eps, norm_offset, norm,
                 **attention):  # fmt: skip
        super().__init__()
        self.position = {name: i for i, name in enumerate(given)}
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.norm = norm
        self.rotated = "cos_sin" in given
        self.query_normed, self.key_normed = "q_norm" in given, "k_norm" in given
        self.widths = (num_heads * head_size, num_kv_heads * head_size)
        self.rms = RmsNorm(("x", "weight"), norm_eps, norm_offset)
        self.rotary = Rotary((), head_size, rotary_dim, neox)
        self.write = KvWrite(())
        attention_given = tuple(name for name in given if name in ("sinks", "alibi_slopes", "sink_kv"))
        self.attend = PagedAttention(attention_given, num_heads, num_kv_heads, head_size, **attention)

    def prepare(self, x, norm_weight, tensors):
        if norm_weight is not None and self.norm == "full":
            x = self.rms(x, norm_weight)
        if norm_weight is not None and self.norm == "head":
            heads = ops.reshape(x, (x.shape[0], -1, self.head_size))
            x = ops.reshape(self.rms(heads, norm_weight), x.shape)
        if self.rotated:
            x = self.rotary(tensors[1], x, tensors[self.position["cos_sin"]])
        return x

    def construct(self, *tensors):
        queries, keys = self.widths
        query, key, value = ops.split(tensors[0], (queries, keys, tensors[0].shape[1] - queries - keys), 1)
        query_norm = key_norm = None
        if self.query_normed:
            query_norm = tensors[self.position["q_norm"]]
        if self.key_normed:
            key_norm = tensors[self.position["k_norm"]]
        query = self.prepare(query, query_norm, tensors)
        key = self.prepare(key, key_norm, tensors)
        cache = tensors[self.position["kv_cache"]]
        cache = ops.depend(cache, self.write(cache, key, value, tensors[self.position["slot_mapping"]]))
        return self.attend(query, cache, tensors[self.position["block_table"]],
                           tensors[self.position["query_start_loc"]], tensors[self.position["seq_lens"]])  # fmt: skip
