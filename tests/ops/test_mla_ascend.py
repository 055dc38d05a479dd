"""The Ascend implementations of latent attention pass MindSpore's own type and shape inference, by export."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from tests.ops.test_attention_ascend import export, in_scratch_folder, zeros  # noqa: F401  the fixture is used
from vllm_mindspore.ops import registry

TOKENS, REQUESTS, BLOCKS, BLOCK_SIZE = 5, 2, 10, 16
HEADS, NOPE, ROPE, V, LORA = 16, 128, 64, 128, 512
SIZES = {
    "num_heads": HEADS, "nope_dim": NOPE, "rope_dim": ROPE, "v_dim": V, "kv_lora_rank": LORA, "scale": 0.1,
    "block_size": BLOCK_SIZE,
}  # fmt: skip
CACHES = {4: (BLOCKS, BLOCK_SIZE, 1, LORA + ROPE), 3: (BLOCKS * BLOCK_SIZE, 1, LORA + ROPE)}
DTYPES = [ms.bfloat16, ms.float16]


def step():
    """block_table, query_start_loc, seq_lens."""
    shapes = ((REQUESTS, 4), (REQUESTS + 1,), (REQUESTS,))
    return [zeros(*shape, dtype=ms.int32) for shape in shapes]


def slots():
    return zeros(TOKENS, dtype=ms.int64)


@pytest.mark.parametrize("rank", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(dtype, rank):
    op = registry.build("mla_kv_write", "ascend")
    graph = export(op, zeros(*CACHES[rank], dtype=dtype), zeros(TOKENS, LORA), zeros(TOKENS, 1, ROPE), slots())
    assert "ReshapeAndCache" in graph


def test_kv_write_of_a_wrong_size_is_refused():
    op = registry.build("mla_kv_write", "ascend")
    with pytest.raises((ValueError, RuntimeError)):
        export(op, zeros(*CACHES[4], dtype=ms.float16), zeros(TOKENS, LORA), zeros(TOKENS, 1, ROPE + 2), slots())


@pytest.mark.parametrize("rank", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype, rank):
    op = registry.build("mla_attention", "ascend", (), **SIZES)
    kv_b = zeros(HEADS * (NOPE + V), LORA, dtype=dtype)
    for shape in ((TOKENS, HEADS, NOPE + ROPE), (TOKENS, HEADS * (NOPE + ROPE))):
        graph = export(op, zeros(*shape), kv_b, zeros(*CACHES[rank], dtype=dtype), *step())
        assert {"PagedAttention", "BatchMatMul"} <= graph


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_qkv_attention(normed, rotated):
    present = (("cos_sin",) if rotated else ()) + (("kv_norm",) if normed else ())
    op = registry.build("mla_qkv_attention", "ascend", present, **SIZES, kv_column=24, neox=False, norm_eps=1e-6,
                        norm_offset=0.0)  # fmt: skip
    inputs = [zeros(TOKENS, HEADS * (NOPE + ROPE)), zeros(TOKENS, 24 + LORA + ROPE), slots()]
    inputs += [zeros(50, ROPE)] if rotated else []
    inputs += [zeros(LORA, dtype=ms.bfloat16)] if normed else []
    inputs += [zeros(HEADS * (NOPE + V), LORA, dtype=ms.bfloat16), zeros(*CACHES[4], dtype=ms.bfloat16)]
    graph = export(op, *inputs, slots(), *step())
    assert {"ReshapeAndCache", "PagedAttention", "BatchMatMul"} <= graph
    assert ("RotaryPositionEmbedding" in graph) == rotated
    assert ("RmsNorm" in graph) == normed


@pytest.mark.parametrize("parts", [1, 3])
def test_columns_also_run(parts):
    x = ms.Tensor(np.arange(2 * 27, dtype=np.float32).reshape(2, 27))
    op = registry.build("columns", "ascend", begin=3, end=7, parts=parts)
    assert export(op, x)
    ours = registry.build("columns", "cpu", begin=3, end=7, parts=parts)
    assert np.array_equal(op(x).asnumpy(), ours(x).asnumpy())
