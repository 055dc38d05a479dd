"""The lightning indexer of sparse attention (DeepSeek V3.2, https://arxiv.org/abs/2512.02556): a token's best keys.

A layer's indexer has heads of its own, small ones, and one key for all of them: keys are cached in kv_cache
[num_slots, 1, head_dim], float32, bfloat16 or float16, normed and rotated. The score of a query q and a key k is
sum over heads of weight * max(q . k, 0), and a token attends to the top_k keys with the best scores.

Scores are compared, never returned, so what multiplies all of a token's scores changes nothing and is left out: the
scales of heads and softmax. So are the Hadamard rotation of queries and keys, which changes no dot product, and the
rounding to fp8 that it prepares: the cache has the type of other KV caches.

With a bf16 cache, CPUs that have bf16 dot products round queries to bf16. A token's positions do not depend on the
other requests of the step, on the number of threads, or on where its prompt was cut into chunks.
"""

from __future__ import annotations

from vllm_mindspore.ops.fakes import like_input
from vllm_mindspore.ops.operator import Operator, Schema, ascend_cell
from vllm_mindspore.ops.rotary import check_rotary_dim

_SIZES = ("num_heads", "head_dim", "top_k", "block_size")


def _lightning_indexer_fake(query, key_weights, positions, cos_sin, key_norm, key_norm_bias, kv_cache, slot_mapping,
                            block_table, query_start_loc, seq_lens, num_heads, head_dim, rope_dim, top_k,
                            *_):  # fmt: skip
    return like_input(query, (query.shape[0], top_k))


def _check_lightning_indexer(given, head_dim, rope_dim, **attributes):
    check_rotary_dim(head_dim, rope_dim)
    attributes["head_dim"] = head_dim
    sizes = {name: attributes[name] for name in _SIZES}
    if min(sizes.values()) <= 0:
        raise ValueError(f"lightning_indexer: {sizes}, expected positive numbers")


OPERATORS = [
    Operator(
        # query [T, num_heads * head_dim] and key_weights [T, head_dim + num_heads], a token's key and then the weights
        # of the heads, f32; key_norm and key_norm_bias [head_dim]: layer norm of keys; cos_sin [P, rope_dim]: queries
        # and normed keys are rotated in their first rope_dim elements, in pairs (i, i + rope_dim / 2) if neox, else
        # (2i, 2i + 1). Writes the step's keys, then selects: [T, top_k] f32, the positions of the keys of a token,
        # ascending, of equal scores the lower positions. A token with top_k keys or fewer has all, then -1; a token of
        # no request has -1 alone. Contexts of up to 2^24 tokens.
        name="lightning_indexer",
        schema=Schema.parse(
            "(Tensor query, Tensor key_weights, Tensor positions, Tensor cos_sin, Tensor key_norm, "
            "Tensor key_norm_bias, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor block_table, "
            "Tensor query_start_loc, Tensor seq_lens, int num_heads, int head_dim, int rope_dim, int top_k, "
            "bool neox, float norm_eps, int block_size) -> Tensor"
        ),
        fake=_lightning_indexer_fake,
        cpu="LightningIndexer",
        ascend=ascend_cell("LightningIndexer", "indexer_ascend"),
        check=_check_lightning_indexer,
    ),
]
