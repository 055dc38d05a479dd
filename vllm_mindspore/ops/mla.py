"""Multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434) over a paged cache of latents.

A layer's cache is kv_cache [num_slots, 1, kv_lora_rank + rope_dim], float32, bfloat16 or float16: a slot's latent,
normed, then its rotated key part that all heads share. kv_b [num_heads * (nope_dim + v_dim), kv_lora_rank] expands a
latent to the heads' keys and values; of each head its rows for keys, then those for values. It is read where it is, in
either of two forms, chosen per request from its numbers of queries and keys alone:

- absorbed (decode): queries are taken into the latent space, all heads attend to the latents, and what they sum is
  expanded;
- expanded (prefill): the latents are expanded to keys and values, a block of the context at a time.

Sparse attention selects keys for tokens that have many. Those tokens are absorbed and read the selected latents only;
or their request is expanded as a whole, and other keys are masked, where that takes fewer multiplications.

With a bf16 cache, CPUs that have bf16 dot products round queries, softmax's weights and, of bf16 weights, expanded keys
and values to bf16.

Within one form a token's result does not depend, bit for bit, on the other requests of the step, on the number of
threads, or on where its prompt was cut into chunks; csrc/kernels/mla.h says how.
"""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell

_SIZES = ("num_heads", "nope_dim", "rope_dim", "v_dim", "kv_lora_rank", "block_size")


def _kv_write_fake(kv_cache, kv_c, k_pe, slot_mapping):
    return None


def _mla_attention_fake(query, kv_b, kv_cache, block_table, query_start_loc, seq_lens, selected, num_heads, nope_dim,
                        rope_dim, v_dim, kv_lora_rank, scale, block_size):  # fmt: skip
    return like_input(query, (query.shape[0], num_heads * v_dim))


def _mla_qkv_attention_fake(query, kv_a, positions, cos_sin, kv_norm, kv_b, kv_cache, slot_mapping, block_table,
                            query_start_loc, seq_lens, selected, num_heads, nope_dim, rope_dim, v_dim, kv_lora_rank,
                            scale, block_size, kv_column, neox, norm_eps, norm_offset):  # fmt: skip
    return like_input(query, (query.shape[0], num_heads * v_dim))


def _columns_fake(x, begin, end, parts):
    return like_input(x, (*x.shape[:-1], parts * (end - begin)))


def _check_mla(given, rope_dim, **attributes):
    sizes = {name: attributes[name] for name in _SIZES if name != "rope_dim"}
    if min(sizes.values()) <= 0 or rope_dim < 0:
        raise ValueError(f"{sizes}, rope_dim {rope_dim}: expected positive numbers, and rope_dim 0 (none) or more")
    if "cos_sin" in given and (rope_dim == 0 or rope_dim % 2):
        raise ValueError(f"rope_dim {rope_dim}: rotation needs an even number above 0")


def _check_columns(given, begin, end, parts):
    if not 0 <= begin < end or parts < 1:
        raise ValueError(f"columns {begin} to {end} of {parts} parts: expected 0 <= begin < end and 1 part or more")


OPERATORS = [
    Operator(
        # kv_c [T, kv_lora_rank] and k_pe [T, rope_dim] or [T, 1, rope_dim] f32; slot_mapping [T] int64, where a
        # negative slot skips the token.
        name="mla_kv_write",
        schema=Schema.parse("(Tensor(a!) kv_cache, Tensor kv_c, Tensor k_pe, Tensor slot_mapping) -> ()"),
        fake=_kv_write_fake,
        cpu="MlaKvWrite",
        ascend=ascend_cell("MlaKvWrite", "mla_ascend"),
    ),
    Operator(
        # query [T, num_heads * (nope_dim + rope_dim)] or rank 3, f32, rotated; kv_b as above; block_table [R, B],
        # query_start_loc [R + 1], seq_lens [R] int32. Result [T, num_heads * v_dim] f32, causal, zeros for tokens of no
        # request: softmax(scale * (q_nope . k_nope + q_pe . k_pe)) v. selected [T, K] f32: of a token with more than K
        # keys, the positions of the K keys that it attends to (`lightning_indexer`); other rows are not read.
        name="mla_attention",
        schema=Schema.parse(
            "(Tensor query, Tensor kv_b, Tensor kv_cache, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, "
            "Tensor? selected, int num_heads, int nope_dim, int rope_dim, int v_dim, int kv_lora_rank, float scale, "
            "int block_size) -> Tensor"
        ),
        fake=_mla_attention_fake,
        cpu="MlaAttention",
        ascend=ascend_cell("MlaAttention", "mla_ascend"),
        check=_check_mla,
        ordered=True,  # as paged_attention
    ),
    Operator(
        # query as above, not yet rotated; kv_a [T, W] f32 with the latent and the key part to rotate in columns
        # [kv_column, kv_column + kv_lora_rank + rope_dim). Norms the latent (RMS, gamma = kv_norm + norm_offset) if
        # kv_norm is given, rotates queries and keys if cos_sin [P, rope_dim] is, in pairs (i, i + rope_dim / 2) if
        # neox, else (2i, 2i + 1); writes the cache as mla_kv_write, then attends as mla_attention.
        name="mla_qkv_attention",
        schema=Schema.parse(
            "(Tensor query, Tensor kv_a, Tensor positions, Tensor? cos_sin, Tensor? kv_norm, Tensor kv_b, "
            "Tensor(a!) kv_cache, Tensor slot_mapping, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, "
            "Tensor? selected, int num_heads, int nope_dim, int rope_dim, int v_dim, int kv_lora_rank, float scale, "
            "int block_size, int kv_column, bool neox, float norm_eps, float norm_offset) -> Tensor"
        ),
        fake=_mla_qkv_attention_fake,
        cpu="MlaQkvAttention",
        ascend=ascend_cell("MlaQkvAttention", "mla_ascend"),
        check=_check_mla,
    ),
    Operator(
        # x [..., N] f32; columns [begin, end) of each of the `parts` equal parts of its rows, one after the other. For
        # between operators of ours, which then stay a sequence.
        name="columns",
        schema=Schema.parse("(Tensor x, int begin, int end, int parts) -> Tensor"),
        fake=_columns_fake,
        cpu="Columns",
        ascend=ascend_cell("Columns", "mla_ascend"),
        check=_check_columns,
    ),
]
