// attention.cc's products over one tile of keys on AMX tiles, for a bf16 cache. Queries and weights are each split into a
// bf16 and the bf16 nearest to what it leaves out, 16 bits together: the products cost little beside the softmax.
//
// Scores are K Q^T, 16 keys by 16 rows, and then transposed; the accumulator's rows are 16 rows of weights by V. A row's
// numbers do not depend on the rows beside it.
#pragma once

#include "amx.h"
#include "attention_tile.h"
#include "pairs.h"

#if defined(__AMX_BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kAmxKeySteps = kTileKeys / kAmxDepth;

// Where a tile of one KV head's keys and values lies, as AMX reads it.
struct AmxKeys {
  bf16 *keys;    // [kTileKeys][head_size]
  bf16 *values;  // tiles [kAmxKeySteps][value_size / 16][16 pairs of keys][16][2]
};

VLLM_MS_INLINE bool fits_amx(const KvCache &cache) {
  return cache.dtype == DType::bf16 && cache.head_size % kAmxDepth == 0 && cache.value_size % kAmxDepth == 0;
}

// v at `high` and what that leaves out at `low`.
VLLM_MS_INLINE void store_split(bf16 *high, bf16 *low, Vec v) {
  store_bf16(high, v);
  store_bf16(low, v - widen(high));
}

// Rows of float queries to B tiles, in blocks of 16 rows: block b at 2 * b * 16 * head_size, its high half, then its low.
// `scratch`: 2 * 16 * head_size.
VLLM_MS_INLINE void pack_amx_queries(const float *query, int64_t padded, int64_t rows, int64_t head_size, bf16 *scratch,
                                     bf16 *tiles) {
  bf16 *low = scratch + kAmxRows * head_size;
  for (int64_t first = 0; first < rows; first += kAmxRows) {
    const int64_t count = rows - first < kAmxRows ? rows - first : kAmxRows;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t d = 0; d < head_size; d += kLanes) {
        store_split(scratch + r * head_size + d, low + r * head_size + d, load(query + (first + r) * padded + d));
      }
    }
    bf16 *block = tiles + 2 * first * head_size;
    tile_rows(scratch, head_size / kAmxDepth, count, block);
    tile_rows(low, head_size / kAmxDepth, count, block + count * head_size);
  }
}

// The cache's rows, in any order in memory, to `out`.
VLLM_MS_INLINE void pack_amx_keys(const void *const *keys, const void *const *values, const KvCache &cache,
                                  Ahead ahead, const AmxKeys &out) {
  const Pairing pairing;
  const int64_t head_size = cache.head_size, blocks = cache.value_size / kAmxRows;
  for (int64_t j = 0; j < kTileKeys; j += 2) {
    prefetch(ahead, j);
    prefetch(ahead, j + 1);
    const bf16 *even = static_cast<const bf16 *>(values[j]), *odd = static_cast<const bf16 *>(values[j + 1]);
    bf16 *pairs = out.values + (j / kAmxDepth * blocks * kAmxRows + j % kAmxDepth / 2) * kAmxDepth;
    for (int64_t d = 0; d < head_size; d += kAmxDepth) {
      for (int64_t k = j; k < j + 2; ++k) {
        _mm512_storeu_si512(out.keys + k * head_size + d, _mm512_loadu_si512(static_cast<const bf16 *>(keys[k]) + d));
      }
    }
    for (int64_t d = 0; d < cache.value_size; d += kAmxDepth) {
      __m512i paired[2];
      pairing.pair(even + d, odd + d, paired);
      bf16 *at = pairs + d / kAmxRows * kAmxTile;
      _mm512_storeu_si512(at, paired[0]);
      _mm512_storeu_si512(at + kAmxTile, paired[1]);
    }
  }
}

// scores[r, j] of `count` rows for the keys of whole blocks of 32 that hold [begin, end).
VLLM_MS_INLINE void score_amx(AmxTiles &tiles, const bf16 *queries, int64_t count, const AmxKeys &k, int64_t begin,
                              int64_t end, int64_t head_size, float *scores) {
  alignas(64) float sums[2][kAmxSums];
  tiles.set(kAmxRows, kAmxRows, count, count);
  for (int64_t j = begin / kAmxDepth * kAmxDepth; j < end; j += kAmxDepth) {
    _tile_zero(0);
    _tile_zero(2);
    for (int64_t d = 0; d < head_size; d += kAmxDepth) {
      const bf16 *keys = k.keys + j * head_size + d;
      _tile_loadd(6, queries + d * count, 4 * count);
      _tile_loadd(4, keys, 2 * head_size);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, keys + kAmxRows * head_size, 2 * head_size);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, queries + (head_size + d) * count, 4 * count);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(2, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(2, sums[1], 64);
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int i = 0; i < kAmxRows; ++i) rows[i] = _mm512_load_si512(sums[half] + i * kAmxRows);
      transpose16(rows);
      for (int64_t r = 0; r < count; ++r) {
        _mm512_storeu_si512(scores + r * kTileKeys + j + half * kAmxRows, rows[r]);
      }
    }
  }
}

// The weights of a row, the high halves and then the low; zeros outside [begin, end).
VLLM_MS_INLINE void pack_amx_weights(const float *weights, int64_t begin, int64_t end, bf16 *out) {
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    const int64_t from = begin > j ? begin - j : 0, to = end - j < kLanes ? end - j : kLanes;
    const uint32_t seen = from < to ? ((1u << to) - 1) & ~((1u << from) - 1) : 0;
    const __m512 w = _mm512_maskz_loadu_ps(static_cast<__mmask16>(seen), weights + j);
    store_split(out + j, out + kTileKeys + j, reinterpret_cast<Vec>(w));
  }
}

// accumulator[r] += weights[r] V for `count` rows; weights [count][2][kTileKeys].
VLLM_MS_INLINE void accumulate_amx(AmxTiles &tiles, float *accumulator, int64_t padded, const bf16 *weights,
                                   int64_t count, const AmxKeys &k, int64_t begin, int64_t end, int64_t value_size) {
  const int64_t blocks = value_size / kAmxRows, bytes = padded * sizeof(float);
  tiles.set(count, count, kAmxRows, kAmxRows);
  for (int64_t block = 0; block < blocks; block += 2) {
    float *sums = accumulator + block * kAmxRows;
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kAmxRows, bytes);
    for (int64_t step = begin / kAmxDepth; step * kAmxDepth < end; ++step) {
      const bf16 *values = k.values + (step * blocks + block) * kAmxTile;
      _tile_loadd(4, weights + step * kAmxDepth, 4 * kTileKeys);
      _tile_loadd(6, values, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + kAmxTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, weights + kTileKeys + step * kAmxDepth, 4 * kTileKeys);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + kAmxRows, bytes);
  }
}

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
