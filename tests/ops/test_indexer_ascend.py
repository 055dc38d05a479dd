"""Sparse attention's Ascend implementations pass MindSpore's own type and shape inference, by export."""

from __future__ import annotations

import mindspore as ms
import pytest

from tests.ops.test_attention_ascend import export, in_scratch_folder, zeros  # noqa: F401  the fixture is used
from tests.ops.test_mla_ascend import BLOCK_SIZE, BLOCKS, CACHES, HEADS, LORA, NOPE, ROPE, SIZES, TOKENS, V, slots, step
from vllm_mindspore.ops import registry

INDEX_HEADS, INDEX_SIZE, TOP_K = 64, 128, 2048
INDEXER = {
    "num_heads": INDEX_HEADS, "head_dim": INDEX_SIZE, "rope_dim": ROPE, "top_k": TOP_K, "neox": True,
    "norm_eps": 1e-6, "block_size": BLOCK_SIZE,
}  # fmt: skip
KEYS = {4: (BLOCKS, BLOCK_SIZE, 1, INDEX_SIZE), 3: (BLOCKS * BLOCK_SIZE, 1, INDEX_SIZE)}
DTYPES = [ms.bfloat16, ms.float16]


def indexer_inputs(rank=4, dtype=ms.bfloat16, width=INDEX_SIZE + INDEX_HEADS):
    norm = [zeros(INDEX_SIZE), zeros(INDEX_SIZE)]
    return [zeros(TOKENS, INDEX_HEADS * INDEX_SIZE), zeros(TOKENS, width), slots(), zeros(50, ROPE), *norm,
            zeros(*KEYS[rank], dtype=dtype), slots(), *step()]  # fmt: skip


@pytest.mark.parametrize("rank", KEYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lightning_indexer(rank, dtype):
    graph = export(registry.build("lightning_indexer", "ascend", (), **INDEXER), *indexer_inputs(rank, dtype))
    assert {"LightningIndexer", "ReshapeAndCache", "RotaryPositionEmbedding"} <= graph


def test_an_indexer_of_other_heads_is_refused():
    op = registry.build("lightning_indexer", "ascend", (), **{**INDEXER, "num_heads": INDEX_HEADS - 1})
    with pytest.raises((ValueError, RuntimeError)):
        export(op, *indexer_inputs())


@pytest.mark.parametrize("rank", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_selected_positions(rank, dtype):
    op = registry.build("mla_attention", "ascend", ("selected",), **SIZES)
    kv_b, cache = zeros(HEADS * (NOPE + V), LORA, dtype=dtype), zeros(*CACHES[rank], dtype=dtype)
    graph = export(op, zeros(TOKENS, HEADS, NOPE + ROPE), kv_b, cache, *step(), zeros(TOKENS, TOP_K))
    assert {"SparseFlashAttention", "BatchMatMul"} <= graph and "PagedAttention" not in graph


def test_qkv_attention_to_selected_positions():
    present = ("cos_sin", "kv_norm", "selected")
    op = registry.build("mla_qkv_attention", "ascend", present, **SIZES, kv_column=24, neox=False, norm_eps=1e-6,
                        norm_offset=0.0)  # fmt: skip
    inputs = [zeros(TOKENS, HEADS * (NOPE + ROPE)), zeros(TOKENS, 24 + LORA + ROPE), slots(), zeros(50, ROPE)]
    inputs += [zeros(LORA, dtype=ms.bfloat16), zeros(HEADS * (NOPE + V), LORA, dtype=ms.bfloat16)]
    graph = export(op, *inputs, zeros(*CACHES[4], dtype=ms.bfloat16), slots(), *step(), zeros(TOKENS, TOP_K))
    assert {"ReshapeAndCache", "SparseFlashAttention", "RotaryPositionEmbedding"} <= graph
