"""kv_write on CPU: what it writes, what it leaves alone, and who sees it."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import nn
from mindspore.common import np_dtype

from tests.ops import attention_reference as reference
from vllm_mindspore.ops import registry

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 32, 16
ATTENTION = {
    "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE, "scale": 0.2, "block_size": BLOCK_SIZE,
    "sliding_window": 0, "soft_cap": 0.0,
}  # fmt: skip


def share(t):
    """The MindSpore tensor with the memory of a torch tensor; not by dlpack, which PyNative operators copy."""
    bits = t.view(torch.uint16).numpy().view(np_dtype.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()
    return ms.from_numpy(bits)


def write(cache, key, value, slots):
    """kv_write in PyNative into a torch tensor."""
    op = registry.build("kv_write", "cpu")
    op(share(cache), *(ms.Tensor(np.ascontiguousarray(t)) for t in (key, value, slots))).asnumpy()


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(
    "kv_heads,head_size,value_size",
    [(2, 64, 64), (1, 20, 20), (3, 33, 33), (8, 128, 128), (1, 1, 1), (2, 192, 128), (3, 33, 20)],
)
def test_written_as_torch_rounds(kv_heads, head_size, value_size, dtype, rank):
    rng = np.random.default_rng(head_size)
    cache = torch.from_numpy(rng.standard_normal((50, kv_heads, head_size + value_size))).to(TORCH[dtype])
    sizes = head_size, value_size
    key, value = (rng.standard_normal((9, kv_heads, size)).astype(np.float32) for size in sizes)
    key[0, 0, 0], value[1, 0, 0], value[2, 0, 0] = np.inf, np.nan, 1e-7
    slots = rng.permutation(50)[:9]
    slots[[3, 5]] = -1
    want = cache.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            want[slot] = torch.from_numpy(np.concatenate([key[token], value[token]], -1)).to(TORCH[dtype])
    if rank == 2:
        key, value = key.reshape(9, -1), value.reshape(9, -1)
    write(cache, key, value, slots)
    torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [0, 1, 900])
def test_any_number_of_tokens(tokens):
    rng = np.random.default_rng(tokens)
    cache = torch.zeros(1000, 4, 64)
    key, value = (rng.standard_normal((tokens, 4, 32)).astype(np.float32) for _ in range(2))
    slots = rng.permutation(1000)[:tokens]
    write(cache, key, value, slots)
    want = np.zeros((1000, 4, 64), np.float32)
    want[slots] = np.concatenate([key, value], -1)
    np.testing.assert_array_equal(cache.numpy(), want)


def test_all_slots_skipped_in_a_profile_run():
    cache = torch.full((4, 1, 4), 7.0)
    write(cache, np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), np.full(3, -1))
    assert (cache == 7).all()


def test_slot_beyond_the_cache_is_named_and_nothing_else_touched(capfd):
    around = torch.full((12, 1, 4), 7.0)
    cache = around[4:8]
    with pytest.raises(RuntimeError):
        write(cache, np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), np.array([1, 4, 2**40]))
    assert "vllm_ms.kv_write: slot_mapping has slot 4 for token 1, the cache has 4" in capfd.readouterr().err
    want = torch.full((12, 1, 4), 7.0)
    want[5] = 1
    assert torch.equal(around, want)


class WriteReadTwice(nn.Cell):
    """Writes, attends, writes other values to the same slots, attends again."""

    def __init__(self):
        super().__init__()
        self.write = registry.build("kv_write", "cpu")
        self.attend = registry.build("paged_attention", "cpu", (), **ATTENTION)

    def run(self, cache, query, first, second, slots, block_table, query_start_loc, seq_lens):
        self.write(cache, first, first, slots)
        before = self.attend(query, cache, block_table, query_start_loc, seq_lens)
        self.write(cache, second, second, slots)
        after = self.attend(query, cache, block_table, query_start_loc, seq_lens)
        return before, after


class OnParameter(WriteReadTwice):
    def __init__(self, cache):
        super().__init__()
        self.cache = ms.Parameter(ms.ops.zeros(cache.shape, cache.dtype), name="cache", requires_grad=False)
        self.cache.set_data(cache)  # Parameter(cache) would copy

    def construct(self, query, first, second, slots, block_table, query_start_loc, seq_lens):
        return self.run(self.cache, query, first, second, slots, block_table, query_start_loc, seq_lens)


class OnInput(WriteReadTwice):
    def construct(self, cache, query, first, second, slots, block_table, query_start_loc, seq_lens):
        return self.run(cache, query, first, second, slots, block_table, query_start_loc, seq_lens)


def dynamic(*shape, dtype=ms.float32):
    return ms.Tensor(shape=list(shape), dtype=dtype)


def compiled(net, cache):
    """The net as one graph with any number of tokens and requests."""
    inputs = [dynamic(None, HEADS * HEAD_SIZE), *[dynamic(None, KV_HEADS * HEAD_SIZE)] * 2]
    inputs += [dynamic(None, dtype=ms.int64), dynamic(None, None, dtype=ms.int32)]
    inputs += [dynamic(None, dtype=ms.int32)] * 2
    net.set_inputs(*([cache] if isinstance(net, OnInput) else []), *inputs)
    return ms.jit(net, capture_mode="ast", jit_level="O0")


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("place", [OnParameter, OnInput])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_order_of_writes_and_reads_and_torch_sees_the_writes(dtype, place, mode):
    rng = np.random.default_rng(1)
    cache = torch.from_numpy(rng.standard_normal((20 * BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE))).to(TORCH[dtype])
    shared = share(cache)
    net = place(shared) if place is OnParameter else place()
    leading = [] if place is OnParameter else [shared]
    if mode == "graph":
        net = compiled(net, shared)
    for requests in ([(3, 40), (1, 100), (9, 9)], [(1, 41), (0, 100)], [], [(0, 3)], [(70, 70)]):
        step = reference.make_step(rng, requests, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
        tokens, slots = step.num_tokens, step.slot_mapping()
        query = rng.standard_normal((tokens, HEADS * HEAD_SIZE)).astype(np.float32)
        values = [rng.standard_normal((tokens, KV_HEADS * HEAD_SIZE)).astype(np.float32) for _ in range(2)]
        arrays = [query, *values, slots, step.block_table, step.query_start_loc, step.seq_lens]
        untouched = np.ones(len(cache), bool)
        untouched[slots] = False
        old = cache.clone()
        outputs = [t.asnumpy() for t in net(*leading, *(ms.Tensor(a) for a in arrays))]
        for output, value in zip(outputs, values, strict=True):
            rows = torch.from_numpy(value).to(TORCH[dtype]).reshape(tokens, KV_HEADS, HEAD_SIZE)
            old[slots] = torch.cat([rows, rows], -1)
            step.kv_cache = old.double().numpy()
            want = reference.attention(query.reshape(tokens, HEADS, HEAD_SIZE), step, HEADS, 0.2)
            np.testing.assert_allclose(output, want, atol=max(2e-6, reference.rounding(dtype, HEAD_SIZE)))
        assert torch.equal(cache, old)
