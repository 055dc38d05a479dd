"""The Ascend implementations pass MindSpore's own type and shape inference, by export on this machine."""

from __future__ import annotations

import re

import mindspore as ms
import pytest
from mindspore import ops

from tests.ops.helpers import Call
from vllm_mindspore.ops import registry
from vllm_mindspore.ops.operator import UnsupportedOperator

TOKENS, REQUESTS, BLOCKS, BLOCK_SIZE = 5, 2, 10, 16
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 128
ATTENTION = {
    "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE, "scale": 0.1, "block_size": BLOCK_SIZE,
    "sliding_window": 0, "soft_cap": 0.0,
}  # fmt: skip
QKV = {**ATTENTION, "rotary_dim": HEAD_SIZE, "neox": True, "norm_eps": 1e-6, "norm_offset": 0.0, "norm": ""}
CACHES = {4: (BLOCKS, BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE), 3: (BLOCKS * BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE)}


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a refused export leaves a dump in the working directory


def export(op, *inputs) -> set[str]:
    """Names of the primitives in the exported graph."""
    ms.export(Call(op), *inputs, file_name="model", file_format="MINDIR")
    with open("model.mindir", "rb") as file:
        return {name.decode() for name in re.findall(rb"REF::(\w+):\d+", file.read())}


def zeros(*shape, dtype=ms.float32):
    return ops.zeros(shape, dtype)


def step():
    """block_table, query_start_loc, seq_lens."""
    shapes = ((REQUESTS, 4), (REQUESTS + 1,), (REQUESTS,))
    return [zeros(*shape, dtype=ms.int32) for shape in shapes]


def slots():
    return zeros(TOKENS, dtype=ms.int64)


@pytest.mark.parametrize(
    "rotary_dim,neox,dtype",
    [(128, True, ms.float32), (128, False, ms.bfloat16), (64, True, ms.float16), (64, False, ms.bfloat16)],
)
def test_rotary(rotary_dim, neox, dtype):
    op = registry.build("rotary", "ascend", (), head_size=HEAD_SIZE, rotary_dim=rotary_dim, neox=neox)
    for shape in ((TOKENS, HEADS, HEAD_SIZE), (TOKENS, HEADS * HEAD_SIZE)):
        graph = export(op, slots(), zeros(*shape), zeros(50, rotary_dim, dtype=dtype))
        assert "RotaryPositionEmbedding" in graph


@pytest.mark.parametrize("rank", CACHES)
@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.float16])
def test_kv_write(dtype, rank):
    op = registry.build("kv_write", "ascend")
    shape = (TOKENS, KV_HEADS, HEAD_SIZE) if rank == 3 else (TOKENS, KV_HEADS * HEAD_SIZE)
    graph = export(op, zeros(*CACHES[rank], dtype=dtype), zeros(*shape), zeros(*shape), slots())
    assert "ReshapeAndCache" in graph


def test_kv_write_of_a_wrong_size_is_refused():
    op = registry.build("kv_write", "ascend")
    wrong = zeros(TOKENS, KV_HEADS * HEAD_SIZE + 2)
    with pytest.raises((ValueError, RuntimeError)):
        export(op, zeros(*CACHES[4], dtype=ms.float16), wrong, wrong, slots())


@pytest.mark.parametrize("rank", CACHES)
@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.float16])
def test_paged_attention(dtype, rank):
    op = registry.build("paged_attention", "ascend", (), **ATTENTION)
    shape = (TOKENS, HEADS, HEAD_SIZE) if rank == 3 else (TOKENS, HEADS * HEAD_SIZE)
    graph = export(op, zeros(*shape), zeros(*CACHES[rank], dtype=dtype), *step())
    assert "PagedAttention" in graph


def test_values_narrower_than_keys():
    cache = zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE + 96, dtype=ms.bfloat16)
    key, value = (zeros(TOKENS, KV_HEADS * size) for size in (HEAD_SIZE, 96))
    assert "ReshapeAndCache" in export(registry.build("kv_write", "ascend"), cache, key, value, slots())
    query = zeros(TOKENS, HEADS * HEAD_SIZE)
    attend = registry.build("paged_attention", "ascend", (), **ATTENTION)
    assert "PagedAttention" in export(attend, query, cache, *step())
    fused = registry.build("qkv_attention", "ascend", ("cos_sin",), **QKV)
    qkv = zeros(TOKENS, (HEADS + KV_HEADS) * HEAD_SIZE + KV_HEADS * 96)
    assert {"ReshapeAndCache", "PagedAttention"} <= export(
        fused, qkv, slots(), zeros(50, HEAD_SIZE), cache, slots(), *step()
    )


def test_float32_cache_is_refused_by_the_primitive():
    op = registry.build("paged_attention", "ascend", (), **ATTENTION)
    with pytest.raises(TypeError, match="key_cache.*must be a type of"):
        export(op, zeros(TOKENS, HEADS * HEAD_SIZE), zeros(*CACHES[4]), *step())


@pytest.mark.parametrize(
    "present,change",
    [
        ((), {"soft_cap": 30.0}),
        ((), {"sliding_window": 64}),
        (("sinks",), {}),
        (("alibi_slopes",), {}),
        (("sink_kv",), {}),
    ],
)
def test_what_paged_attention_cannot_express_is_named(present, change):
    name = present[0] if present else next(iter(change))
    with pytest.raises(UnsupportedOperator, match=name):
        registry.build("paged_attention", "ascend", present, **{**ATTENTION, **change})
    with pytest.raises(UnsupportedOperator, match=name):
        registry.build("qkv_attention", "ascend", present, **{**QKV, **change})


@pytest.mark.parametrize(
    ("norm", "normed"),
    [("", ()), ("head", ("q_norm", "k_norm")), ("full", ("q_norm", "k_norm")), ("head", ("k_norm",))],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_qkv_attention(norm, normed, rotated):
    present = (("cos_sin",) if rotated else ()) + normed
    op = registry.build("qkv_attention", "ascend", present, **{**QKV, "norm": norm, "norm_offset": 1.0})
    inputs = [zeros(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_SIZE), slots()]
    if rotated:
        inputs.append(zeros(50, HEAD_SIZE))
    heads = {"q_norm": HEADS, "k_norm": KV_HEADS}
    inputs += [zeros((heads[name] if norm == "full" else 1) * HEAD_SIZE, dtype=ms.bfloat16) for name in normed]
    graph = export(op, *inputs, zeros(*CACHES[4], dtype=ms.bfloat16), slots(), *step())
    assert {"ReshapeAndCache", "PagedAttention"} <= graph
    assert ("RotaryPositionEmbedding" in graph) == rotated
    assert ("RmsNorm" in graph) == (norm != "")
