// attention.cc's products over one tile of keys by bf16 dot products, for a bf16 cache. Queries and weights are rounded
// to bf16, as the keys and values are.
//
// The accumulator's dimensions are in the order that interleaving two values leaves them in: see unpaired(). A row's
// numbers do not depend on the rows beside it.
#pragma once

#include "attention_pairs.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define VLLM_MS_ATTENTION_BF16

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

VLLM_MS_INLINE bool fits_bf16(const KvCache &cache) {
  return cache.dtype == DType::bf16 && cache.head_size % kPairs == 0 && cache.value_size % kPairs == 0;
}

constexpr int kValueRows = 6;      // with four vectors of dimensions: 24 sums in registers
constexpr int kScoreRows = 6;      // with four vectors of sums each, on their way to one
constexpr int64_t kFewRows = 4;    // up to here values are read where they are
constexpr int64_t kTurnRows = 12;  // from here on it pays to turn the keys

VLLM_MS_INLINE void round_query(const float *query, int64_t size, bf16 *out) {
  for (int64_t d = 0; d < size; d += kLanes) store_rounded(out + d, load(query + d));
}

// Keys from the last multiple of 16 up to `begin` on, a key a lane: [kTileKeys / 16][size / kPairs][16 pairs][16 keys][2].
VLLM_MS_NOINLINE void turn_keys(const void *const *keys, int64_t begin, int64_t end, int64_t size, Ahead ahead,
                                bf16 *out) {
  for (int64_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
    for (int64_t d = 0; d < size; d += kPairs) {
      __m512i rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = _mm512_loadu_si512(static_cast<const bf16 *>(keys[j + i]) + d);
      transpose16(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(out + j * size + (d + 2 * i) * kLanes, rows[i]);
    }
    for (int i = 0; i < kLanes; ++i) prefetch(ahead, j + i);
  }
}

// Scores of R queries with the keys of N blocks of 16 that turn_keys has turned: score_pairs's, bit for bit. A sum over
// lanes there is one over vectors here, in the order of sum_each.
template <int R, int N>
VLLM_MS_NOINLINE void score_blocks(const bf16 *queries, const bf16 *blocks, int64_t size, float *scores) {
  // What is one lane's sum there.
  const auto lane = [&](int l, Vec(&sum)[R][N]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[r][n] = zero();
    }
    for (int64_t d = 0; d < size; d += kPairs) {
      __m512bh keys[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) keys[n] = load_pairs(blocks + (n * size + d + 2 * l) * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512bh query = repeat_pair(queries + r * size + d + 2 * l);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[r][n] = dot_pairs(query, keys[n], sum[r][n]);
      }
    }
  };
  const auto each = [&](auto body) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) body(r, n);
    }
  };
  Vec total[R][N];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vec halves[R][N];
#pragma GCC unroll 2
    for (int quarter = 0; quarter < 2; ++quarter) {
      Vec quad[R][N];
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const int l = 8 * half + 4 * quarter + odd;
        Vec first[R][N], second[R][N];
        lane(l, first);
        lane(l + 2, second);
        each([&](int r, int n) {
          const Vec both = first[r][n] + second[r][n];
          quad[r][n] = odd == 0 ? both : quad[r][n] + both;
        });
      }
      each([&](int r, int n) { halves[r][n] = quarter == 0 ? quad[r][n] : halves[r][n] + quad[r][n]; });
    }
    each([&](int r, int n) { total[r][n] = half == 0 ? halves[r][n] : total[r][n] + halves[r][n]; });
  }
  each([&](int r, int n) { store(scores + r * kTileKeys + n * kLanes, total[r][n]); });
}

// For keys from the last multiple of 16 up to `begin` on.
template <int R>
VLLM_MS_INLINE void score_turned(const bf16 *queries, const bf16 *keys, int64_t begin, int64_t end, int64_t size,
                                 float *scores) {
  int64_t j = begin / kLanes * kLanes;
  for (; j + kLanes < end; j += 2 * kLanes) score_blocks<R, 2>(queries, keys + j * size, size, scores + j);
  if (j < end) score_blocks<R, 1>(queries, keys + j * size, size, scores + j);
}

// softmax_row and round_weights in one, for a row that sees the whole tile and whose scores are only scaled.
VLLM_MS_NOINLINE void softmax_whole_row(const AttentionInputs &in, const float *scores, bf16 *weights,
                                        const RowState &row) {
  constexpr int kVectors = kTileKeys / kLanes;
  Vec x[kVectors], highest = set1(-kInfinity), sum = zero();
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    x[i] = load(scores + i * kLanes) * in.scale;
    highest = vmax(x[i], highest);
  }
  const Base base = raise(in, highest, row);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const Vec weight = softmax_exp(x[i] - base.value);
    store_rounded(weights + i * kLanes, weight);
    sum += weight;
  }
  *row.sum = *row.sum * base.rescale + hsum(sum);
}

// Values [begin, end), both even, as [kTileKeys / 2][size / 16][16][2]: of two values side by side.
VLLM_MS_NOINLINE void pair_values(const void *const *values, int64_t begin, int64_t end, int64_t size,
                                  Ahead ahead, bf16 *out) {
  for (int64_t j = begin; j < end; j += 2) {
    prefetch(ahead, j);
    prefetch(ahead, j + 1);
    const bf16 *even = static_cast<const bf16 *>(values[j]), *odd = static_cast<const bf16 *>(values[j + 1]);
    for (int64_t d = 0; d < size; d += kPairs) {
      const __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
      _mm512_store_si512(out + j * size + 2 * d, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(out + j * size + 2 * d + kPairs, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// accumulator[r] += weights[r, j] * value[j] for j in [begin, end), both even, and N vectors of dimensions from `offset`
// on; `values` as pair_values leaves them.
template <int R, int N>
VLLM_MS_NOINLINE void accumulate_paired(float *accumulator, int64_t padded, const bf16 *weights, const bf16 *values,
                                        int64_t begin, int64_t end, int64_t offset, int64_t size) {
  Vec sums[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[r][n] = load(accumulator + r * padded + offset + n * kLanes);
  }
  for (int64_t j = begin; j < end; j += 2) {
    const bf16 *value = values + j * size + 2 * offset;
    __m512bh vectors[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) vectors[n] = load_pairs(value + n * kPairs);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512bh pair = repeat_pair(weights + r * kTileKeys + j);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = dot_pairs(vectors[n], pair, sums[r][n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(accumulator + r * padded + offset + n * kLanes, sums[r][n]);
  }
}

template <int R>
VLLM_MS_INLINE void accumulate_rows_paired(float *accumulator, int64_t padded, const bf16 *weights, const bf16 *values,
                                           int64_t begin, int64_t end, int64_t size) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) {
    accumulate_paired<R, 4>(accumulator, padded, weights, values, begin, end, d, size);
  }
  if (d < size) accumulate_paired<R, 2>(accumulator, padded, weights, values, begin, end, d, size);
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
      pair[r] = repeat_pair(weights + r * kTileKeys + j);
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
