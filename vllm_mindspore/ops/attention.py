"""Attention over the paged KV cache, and writing to that cache.

A layer's cache is kv_cache [num_slots, num_kv_heads, head_size + value_size], float32, bfloat16 or float16: key, then
value, of one slot and head side by side. Values are as wide as keys, or narrower: how wide, the cache's shape says.
Token p of a request is in slot block_table[request, p // block_size] * block_size + p % block_size.

A token's result does not depend, bit for bit, on the other requests of the step, on the number of threads, or on where
its prompt was cut into chunks; csrc/kernels/attention.h says how.
"""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell
from vllm_mindspore.ops.rotary import check_rotary_dim

_NORMS = ("", "head", "full")


def _kv_write_fake(kv_cache, key, value, slot_mapping):
    return None


def _paged_attention_fake(query, kv_cache, block_table, query_start_loc, seq_lens, sinks, alibi_slopes, sink_kv,
                          num_heads, num_kv_heads, head_size, scale, block_size, sliding_window, soft_cap):  # fmt: skip
    return like_input(query, (query.shape[0], num_heads * (kv_cache.shape[2] - head_size)))


def _qkv_attention_fake(qkv, positions, cos_sin, q_norm, k_norm, kv_cache, slot_mapping, block_table, query_start_loc,
                        seq_lens, sinks, alibi_slopes, sink_kv, num_heads, num_kv_heads, head_size, scale, block_size,
                        sliding_window, soft_cap, rotary_dim, neox, norm_eps, norm_offset, norm):  # fmt: skip
    return like_input(qkv, (qkv.shape[0], num_heads * (kv_cache.shape[2] - head_size)))


def _check_attention(given, num_heads, num_kv_heads, head_size, block_size, sliding_window, soft_cap, **_):
    if min(num_heads, num_kv_heads, head_size, block_size) <= 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads {num_heads}, num_kv_heads {num_kv_heads}, head_size {head_size}, block_size {block_size}: "
            "expected positive numbers, and num_heads a multiple of num_kv_heads"
        )
    if sliding_window < 0 or soft_cap < 0:
        raise ValueError(f"sliding_window {sliding_window}, soft_cap {soft_cap}: expected 0 (none) or more")
    if "sink_kv" in given and ("alibi_slopes" in given or sliding_window):
        raise ValueError("sink_kv with alibi_slopes or a sliding window: a sink has no position")


def _check_qkv_attention(given, head_size, rotary_dim, norm, **attributes):
    _check_attention(given, head_size=head_size, **attributes)
    if "cos_sin" in given:
        check_rotary_dim(head_size, rotary_dim)
    if norm not in _NORMS:
        raise ValueError(f"norm {norm!r}: expected one of {_NORMS}")
    if bool({"q_norm", "k_norm"}.intersection(given)) != (norm != ""):
        raise ValueError(f"norm {norm!r}: q_norm or k_norm is needed with 'head' and 'full', and only then")


OPERATORS = [
    Operator(
        # key [T, num_kv_heads * head_size] or [T, num_kv_heads, head_size] f32, value alike of value_size; slot_mapping
        # [T] int64, where a negative slot skips the token. A slot beyond the cache is an error; the others are written
        # nevertheless.
        name="kv_write",
        schema=Schema.parse("(Tensor(a!) kv_cache, Tensor key, Tensor value, Tensor slot_mapping) -> ()"),
        fake=_kv_write_fake,
        cpu="KvWrite",
        ascend=ascend_cell("KvWrite", "attention_ascend"),
    ),
    Operator(
        # query [T, num_heads * head_size] or [T, num_heads, head_size] f32; block_table [R, B] int32;
        # query_start_loc [R + 1] int32; seq_lens [R] int32, with this step's tokens; sinks, alibi_slopes [num_heads].
        # Result [T, num_heads * value_size] f32, causal, zeros for tokens of no request:
        #   logit(k) = soft_cap * tanh(scale * q.k / soft_cap) + alibi_slope * (kpos - qpos), for kpos <= qpos and, with
        #   a sliding window, kpos > qpos - sliding_window; softmax over the logits and, if given, the head's sink.
        # sink_kv [S, num_kv_heads, head_size + value_size], of the cache's type: rows that every token sees besides.
        name="paged_attention",
        schema=Schema.parse(
            "(Tensor query, Tensor kv_cache, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, "
            "Tensor? sinks, Tensor? alibi_slopes, Tensor? sink_kv, int num_heads, int num_kv_heads, int head_size, "
            "float scale, int block_size, int sliding_window, float soft_cap) -> Tensor"
        ),
        fake=_paged_attention_fake,
        cpu="PagedAttention",
        ascend=ascend_cell("PagedAttention", "attention_ascend"),
        check=_check_attention,
        ordered=True,  # or MindSpore merges calls around a kv_write, or copies the whole cache before it
    ),
    Operator(
        # qkv [T, (num_heads + num_kv_heads) * head_size + num_kv_heads * value_size] f32 = queries, keys, values. Norms
        # queries if q_norm is given and keys if k_norm is (norm "head": RMS over each head, q_norm, k_norm [head_size];
        # "full": over all heads of a token, q_norm [num_heads * head_size], k_norm [num_kv_heads * head_size]; gamma =
        # weight + norm_offset), rotates both if cos_sin is, writes keys and values as kv_write, then attends as
        # paged_attention.
        name="qkv_attention",
        schema=Schema.parse(
            "(Tensor qkv, Tensor positions, Tensor? cos_sin, Tensor? q_norm, Tensor? k_norm, Tensor(a!) kv_cache, "
            "Tensor slot_mapping, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, Tensor? sinks, "
            "Tensor? alibi_slopes, Tensor? sink_kv, int num_heads, int num_kv_heads, int head_size, float scale, "
            "int block_size, int sliding_window, float soft_cap, int rotary_dim, bool neox, float norm_eps, "
            "float norm_offset, str norm) -> Tensor"
        ),
        fake=_qkv_attention_fake,
        cpu="QkvAttention",
        ascend=ascend_cell("QkvAttention", "attention_ascend"),
        check=_check_qkv_attention,
    ),
]
