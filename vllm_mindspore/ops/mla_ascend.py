"""Multi-head latent attention on Ascend: cells of MindSpore's primitives. Checked by export, never run by our tests.

All requests take the absorbed form: PagedAttention with `mla_v_dim` reads a latent as key and its first part as value
(its shape inference wants a value cache all the same, and gets the key's).
The cache may be [num_blocks, block_size, 1, kv_lora_rank + rope_dim], as the primitives take it (preferred), or
[num_slots, 1, kv_lora_rank + rope_dim]; bfloat16 or float16. kv_b is cut into its two parts in each step, and where
positions are selected the cache is cut, too, for SparseFlashAttention: a copy of the layer's cache in each step, which
a cache in two parts would save.
"""

from __future__ import annotations

from mindspore import float32 as ms_float32
from mindspore import int32 as ms_int32
from mindspore import nn, ops
from mindspore.ops.auto_generate import gen_ops_prim as prim

from vllm_mindspore.ops.ascend import RmsNorm
from vllm_mindspore.ops.attention_ascend import Rotary, blocked

# SparseFlashAttention's sparse_mode, pre_tokens and next_tokens, and attention_mode
_CAUSAL, _ALL, _ABSORBED = 3, 2**63 - 1, 2


class Columns(nn.Cell):
    """x [..., N]: columns [begin, end) of each of the `parts` of a row; with more than one, x is [T, N]."""

    def __init__(self, given, begin, end, parts):
        super().__init__()
        self.begin, self.end, self.parts = begin, end, parts

    def construct(self, x):
        if self.parts == 1:
            return x[..., self.begin : self.end]
        parts = ops.reshape(x, (-1, self.parts, x.shape[-1] // self.parts))[..., self.begin : self.end]
        return ops.reshape(parts, (-1, self.parts * (self.end - self.begin)))


class MlaKvWrite(nn.Cell):
    """kv_cache, kv_c [T, kv_lora_rank], k_pe [T, rope_dim] or [T, 1, rope_dim], slot_mapping [T]."""

    def __init__(self, given):
        super().__init__()
        self.write = prim.ReshapeAndCache()

    def construct(self, kv_cache, kv_c, k_pe, slot_mapping):
        cache = blocked(kv_cache, 1)
        rows = ops.concat((kv_c, ops.reshape(k_pe, (kv_c.shape[0], -1))), -1)
        rows = ops.reshape(rows, (slot_mapping.shape[0], cache.shape[-1]))  # nothing else compares their widths
        return self.write(ops.cast(rows, cache.dtype), None, cache, None, ops.cast(slot_mapping, ms_int32))


class MlaAttention(nn.Cell):
    """query [T, num_heads * (nope_dim + rope_dim)] or rank 3; result [T, num_heads * v_dim]."""

    def __init__(self, given, num_heads, nope_dim, rope_dim, v_dim, kv_lora_rank, scale, block_size):
        super().__init__()
        self.num_heads, self.nope, self.rope, self.v, self.lora = num_heads, nope_dim, rope_dim, v_dim, kv_lora_rank
        self.block_size, self.scale = block_size, scale
        self.sparse = "selected" in given
        self.absorb = prim.BatchMatMul()
        self.expand = prim.BatchMatMul(transpose_b=True)
        # TRAPEZOIDAL: causal
        self.attend = prim.PagedAttention(num_heads, scale, 1, mask_mode="TRAPEZOIDAL", mla_v_dim=kv_lora_rank)
        self.attend_to = prim.SparseFlashAttention()

    def attend_to_all(self, absorbed, cache, block_table, query_start_loc, seq_lens):
        query_lens = query_start_loc[1:] - query_start_loc[:-1]
        flat = ops.reshape(absorbed, (absorbed.shape[0], -1))
        return self.attend(flat, cache, cache, block_table, seq_lens, None, None, None, query_lens, None)

    def attend_to_selected(self, absorbed, cache, block_table, query_start_loc, seq_lens, selected):
        """The primitive wants latents and rotated parts as caches of their own: they are cut out of ours."""
        tokens, top_k = selected.shape
        latents, key_parts = cache[..., : self.lora], cache[..., self.lora :]
        positions = ops.reshape(ops.cast(selected, ms_int32), (tokens, 1, top_k))
        return self.attend_to(
            absorbed[..., : self.lora], latents, latents, positions, self.scale, block_table, query_start_loc[1:],
            seq_lens, absorbed[..., self.lora :], key_parts, 1, "TND", "PA_BSND", _CAUSAL, _ALL, _ALL, _ABSORBED,
        )[0]  # fmt: skip

    def construct(self, query, kv_b, kv_cache, block_table, query_start_loc, seq_lens, *selected):
        tokens = query.shape[0]
        cache = blocked(kv_cache, self.block_size)
        heads = ops.cast(ops.reshape(query, (tokens, self.num_heads, self.nope + self.rope)), cache.dtype)
        weight = ops.cast(ops.reshape(kv_b, (self.num_heads, self.nope + self.v, self.lora)), cache.dtype)
        latent = self.absorb(ops.transpose(heads[..., : self.nope], (1, 0, 2)), weight[:, : self.nope])
        absorbed = ops.concat((ops.transpose(latent, (1, 0, 2)), heads[..., self.nope :]), -1)
        if self.sparse:
            sums = self.attend_to_selected(absorbed, cache, block_table, query_start_loc, seq_lens, *selected)
        else:
            sums = self.attend_to_all(absorbed, cache, block_table, query_start_loc, seq_lens)
        sums = ops.transpose(ops.reshape(sums, (tokens, self.num_heads, self.lora)), (1, 0, 2))
        out = ops.transpose(self.expand(sums, weight[:, self.nope :]), (1, 0, 2))
        out = ops.cast(ops.reshape(out, (tokens, self.num_heads * self.v)), ms_float32)
        owned = ops.expand_dims(ops.arange(tokens) < query_start_loc[-1], -1)
        return ops.select(owned, out, ops.zeros_like(out))  # tokens of no request


class MlaQkvAttention(nn.Cell):
    """Norm, rotation, writing and attention, from the cells above."""

    def __init__(self, given, num_heads, nope_dim, rope_dim, v_dim, kv_lora_rank, scale, block_size, kv_column, neox,
                 norm_eps, norm_offset):  # fmt: skip
        super().__init__()
        self.position = {name: i for i, name in enumerate(given)}
        self.num_heads, self.nope, self.rope = num_heads, nope_dim, rope_dim
        self.begin, self.middle = kv_column, kv_column + kv_lora_rank
        self.normed, self.rotated = "kv_norm" in given, "cos_sin" in given
        self.norm = RmsNorm(("x", "weight"), norm_eps, norm_offset)
        self.rotary = Rotary((), rope_dim, rope_dim, neox)
        self.write = MlaKvWrite(())
        attend_given = tuple(name for name in given if name == "selected")
        self.attend = MlaAttention(attend_given, num_heads, nope_dim, rope_dim, v_dim, kv_lora_rank, scale, block_size)

    def construct(self, *tensors):
        query, kv_a, positions = tensors[0], tensors[1], tensors[2]
        query = ops.reshape(query, (query.shape[0], self.num_heads, self.nope + self.rope))
        latent, k_pe = kv_a[:, self.begin : self.middle], kv_a[:, self.middle : self.middle + self.rope]
        if self.normed:
            latent = self.norm(latent, tensors[self.position["kv_norm"]])
        if self.rotated:
            cos_sin = tensors[self.position["cos_sin"]]
            q_pe = self.rotary(positions, query[..., self.nope :], cos_sin)
            query = ops.concat((query[..., : self.nope], q_pe), -1)
            k_pe = self.rotary(positions, k_pe, cos_sin)
        cache = tensors[self.position["kv_cache"]]
        cache = ops.depend(cache, self.write(cache, latent, k_pe, tensors[self.position["slot_mapping"]]))
        requests = [tensors[self.position[name]] for name in ("block_table", "query_start_loc", "seq_lens")]
        selected = tensors[self.position["seq_lens"] + 1 :]
        return self.attend(query, tensors[self.position["kv_b"]], cache, *requests, *selected)
