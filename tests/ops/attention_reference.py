"""Attention in numpy float64, and steps to try it on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ops.helpers import current_isa, stored


def rounding(dtype: str, head_size: int, value_size: int = 0) -> float:
    """What bf16 products of a bf16 cache may change; 0 elsewhere.

    On AMX tiles queries and weights have 16 bits in them; in AVX-512 they have 8, as what the cache holds: read_query.
    """
    if dtype != "bfloat16" or head_size % 32 != 0 or value_size % 32 != 0:
        return 0.0
    return {"amx": 1e-4, "avx512": 1e-2}.get(current_isa(), 0.0)


def read_query(query: np.ndarray, dtype: str, head_size: int) -> np.ndarray:
    """Queries as AVX-512's products read them."""
    rounds = dtype == "bfloat16" and head_size % 32 == 0 and current_isa() == "avx512"
    return stored(query, "bfloat16") if rounds and query.size else query


@dataclass
class Step:
    """The paged state of one step: which request has which tokens, and where they live."""

    kv_cache: np.ndarray  # [num_slots, num_kv_heads, head_size + value_size], float64 values exact in the cache's dtype
    block_table: np.ndarray  # [R, B] int32
    query_start_loc: np.ndarray  # [R + 1] int32
    seq_lens: np.ndarray  # [R] int32
    block_size: int

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    def slots(self, request: int, begin: int, end: int) -> np.ndarray:
        """Slots of positions [begin, end) of a request."""
        position = np.arange(begin, end)
        return self.block_table[request, position // self.block_size] * self.block_size + position % self.block_size

    def token_positions(self) -> np.ndarray:
        """Positions [T] int64 of the step's tokens."""
        lengths = np.diff(self.query_start_loc)
        parts = [np.arange(s - n, s) for s, n in zip(self.seq_lens, lengths, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def slot_mapping(self) -> np.ndarray:
        """Slots [T] int64 of the step's tokens."""
        lengths = np.diff(self.query_start_loc)
        parts = [self.slots(r, self.seq_lens[r] - n, self.seq_lens[r]) for r, n in enumerate(lengths)]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def make_step(rng, requests, block_size, num_kv_heads, head_size, spare_blocks=3, value_size=None) -> Step:
    """requests: (query length, sequence length) pairs. Blocks are scattered over a cache of random values.

    value_size: head_size if None.
    """
    need = [-(-length // block_size) for _, length in requests]
    num_blocks = sum(need) + spare_blocks
    blocks = rng.permutation(num_blocks)
    table = np.zeros((len(requests), max([1, *need])), np.int32)
    used = 0
    for i, n in enumerate(need):
        table[i, :n] = blocks[used : used + n]
        used += n
    width = head_size + (head_size if value_size is None else value_size)
    cache = rng.standard_normal((num_blocks * block_size, num_kv_heads, width)).astype(np.float32)
    start = np.cumsum([0, *(n for n, _ in requests)]).astype(np.int32)
    return Step(cache, table, start, np.array([n for _, n in requests], np.int32), block_size)


def attention(
    query, step, num_heads, scale, sliding_window=0, soft_cap=0.0, sinks=None, alibi_slopes=None, sink_kv=None
):
    """query [T, num_heads, head_size]; returns [T, num_heads * value_size] float64."""
    query = np.asarray(query, np.float64)
    head_size = query.shape[-1]
    out = np.zeros((*query.shape[:2], step.kv_cache.shape[2] - head_size))
    num_kv_heads = step.kv_cache.shape[1]
    for r, length in enumerate(step.seq_lens):
        first, last = step.query_start_loc[r], step.query_start_loc[r + 1]
        if first == last:
            continue
        rows = np.asarray(step.kv_cache[step.slots(r, 0, length)], np.float64)
        learned = 0 if sink_kv is None else len(sink_kv)
        rows = rows if sink_kv is None else np.concatenate([np.asarray(sink_kv, np.float64), rows])
        rows = np.repeat(rows, num_heads // num_kv_heads, axis=1)
        keys, values = rows[..., :head_size], rows[..., head_size:]
        qpos = np.arange(length - (last - first), length)[None, :, None]
        kpos = np.arange(-learned, length)[None, None, :]
        logits = np.einsum("qhd,khd->hqk", query[first:last], keys) * scale
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        if alibi_slopes is not None:
            logits = logits + np.asarray(alibi_slopes, np.float64)[:, None, None] * (kpos - qpos)
        seen = kpos <= qpos
        if sliding_window:
            seen = seen & (kpos > qpos - sliding_window)  # without learned keys, whose position says nothing
        logits = np.where(seen, logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        if sinks is not None:
            sink = np.asarray(sinks, np.float64)[:, None, None]
            top = np.maximum(top, sink)
        weights = np.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sink - top)
        out[first:last] = np.einsum("hqk,khd->qhd", weights / total, values)
    return out.reshape(len(query), num_heads * out.shape[2])


def rotate(x, positions, cos_sin, neox):
    """x [T, heads, head_size]; cos_sin [P, rotary_dim]; returns float64."""
    x = np.array(x, np.float64)
    half = cos_sin.shape[1] // 2
    cos, sin = (np.asarray(part, np.float64)[positions][:, None] for part in (cos_sin[:, :half], cos_sin[:, half:]))
    first, second = (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first] = a * cos - b * sin
    x[..., second] = b * cos + a * sin
    return x


def rms(x, weight, eps, offset):
    """RMS norm over the last dimension in float64."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (np.asarray(weight, np.float64) + offset)


def make_cos_sin(positions, rotary_dim, base=10000.0):
    """vLLM's table [positions, rotary_dim] float32."""
    angle = np.arange(positions)[:, None] / base ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
