// attention.cc's products over one tile of keys by bf16 dot products, for a bf16 cache. A query is split into a bf16 and
// the bf16 nearest to what it leaves out, 16 bits together; weights are rounded to bf16, as the values are.
//
// The accumulator's dimensions are in the order that interleaving two values leaves them in: see unpaired(). A row's
// numbers do not depend on the rows beside it.
#pragma once

#include "attention_tile.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define VLLM_MS_ATTENTION_BF16

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

constexpr int64_t kPairs = 2 * kLanes;  // elements of a vector of bf16

VLLM_MS_INLINE bool fits_bf16(const KvCache &cache) {
  return cache.dtype == DType::bf16 && cache.head_size % kPairs == 0;
}

VLLM_MS_INLINE __m512bh load_bf16(const void *p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

VLLM_MS_INLINE Vec dot_pairs(__m512bh a, __m512bh b, Vec sum) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}

VLLM_MS_INLINE void store_rounded(bf16 *p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &rounded, sizeof(rounded));
}

// A float query of `size` elements to its high half, then its low.
VLLM_MS_INLINE void split_query(const float *query, int64_t size, bf16 *out) {
  for (int64_t d = 0; d < size; d += kLanes) {
    const Vec v = load(query + d);
    store_rounded(out + d, v);
    store_rounded(out + size + d, v - widen(out + d));
  }
}

// As score_rows; queries: [R][2, head_size].
template <int R>
VLLM_MS_NOINLINE void score_rows_bf16(const bf16 *queries, const void *const *keys, int64_t begin, int64_t end,
                                      int64_t size, float *scores, Ahead ahead) {
  constexpr int K = 16 / R;
  for (int64_t j = begin / K * K; j < end; j += K) {
    for (int k = 0; k < K; ++k) prefetch(ahead, j + k);
    Vec sums[R * K] = {};
    for (int64_t d = 0; d < size; d += kPairs) {
      __m512bh high[R], low[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        high[r] = load_bf16(queries + 2 * r * size + d);
        low[r] = load_bf16(queries + (2 * r + 1) * size + d);
      }
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const __m512bh key = load_bf16(static_cast<const bf16 *>(keys[j + k]) + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[r * K + k] = dot_pairs(high[r], key, dot_pairs(low[r], key, sums[r * K + k]));
        }
      }
    }
    float flat[R * K];
    store(flat, sum_each(sums));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTileKeys + j, flat + r * K, K * sizeof(float));
  }
}

// Weights of keys [begin, end) of a tile as bf16, zero for its other keys.
VLLM_MS_INLINE void round_weights(const float *weights, int64_t begin, int64_t end, bf16 *out) {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    const IVec key = lane + static_cast<int32_t>(j);
    const IVec seen = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
    store_rounded(out + j, seen ? load(weights + j) : zero());
  }
}

// accumulator[r] += weights[r, j] * value[j] for j in [begin, end) and N vectors of dimensions from `offset` on; both
// ends of the range are even.
template <int R, int N>
VLLM_MS_NOINLINE void accumulate_bf16(float *accumulator, int64_t padded, const bf16 *weights,
                                      const void *const *values, int64_t begin, int64_t end, int64_t offset,
                                      Ahead ahead) {
  Vec sums[R][2 * N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n) sums[r][n] = load(accumulator + r * padded + offset + n * kLanes);
  }
  for (int64_t j = begin; j < end; j += 2) {
    prefetch(ahead, j);
    prefetch(ahead, j + 1);
    const bf16 *even = static_cast<const bf16 *>(values[j]) + offset;
    const bf16 *odd = static_cast<const bf16 *>(values[j + 1]) + offset;
    __m512bh pair[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t both;
      std::memcpy(&both, weights + r * kTileKeys + j, sizeof(both));
      pair[r] = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const __m512i a = _mm512_loadu_si512(even + n * kPairs), b = _mm512_loadu_si512(odd + n * kPairs);
      const __m512bh low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
      const __m512bh high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r][2 * n] = dot_pairs(low, pair[r], sums[r][2 * n]);
        sums[r][2 * n + 1] = dot_pairs(high, pair[r], sums[r][2 * n + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n) store(accumulator + r * padded + offset + n * kLanes, sums[r][n]);
  }
}

template <int R>
VLLM_MS_INLINE void accumulate_rows_bf16(float *accumulator, int64_t padded, const bf16 *weights,
                                         const void *const *values, int64_t begin, int64_t end, int64_t size,
                                         Ahead ahead) {
  constexpr int N = R == 4 ? 3 : 4;  // of 32 vector registers
  int64_t d = 0;
  for (; d + N * kPairs <= size; d += N * kPairs) {
    accumulate_bf16<R, N>(accumulator, padded, weights, values, begin, end, d, ahead);
    ahead.bytes = 0;
  }
  for (; d < size; d += kPairs) {
    accumulate_bf16<R, 1>(accumulator, padded, weights, values, begin, end, d, ahead);
    ahead.bytes = 0;
  }
}

// The dimensions [d, d + kLanes) of an accumulator's row.
VLLM_MS_INLINE Vec unpaired(const float *row, int64_t d) {
  const float *pair = row + d / kPairs * kPairs;
  const Vec low = load(pair), high = load(pair + kLanes);
  return d % kPairs == 0
             ? __builtin_shuffle(low, high, IVec{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23})
             : __builtin_shuffle(low, high, IVec{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
}

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
