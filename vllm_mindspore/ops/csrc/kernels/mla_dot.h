// Products on bf16 dot products, for a bf16 cache: queries, softmax's weights, and expanded keys and values are rounded
// to bf16, as linear.cc does with activations; sums are float. A row's numbers do not depend on the rows beside it.
#pragma once

#include "attention_pairs.h"
#include "mla_rows.h"

#if defined(__AVX512BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

// Whether rows of the cache can be read as pairs in place.
VLLM_MS_INLINE bool fits_dot(const MlaInputs &in) {
  return in.step.cache.dtype == DType::bf16 && in.lora % kPairs == 0 && in.rope % kPairs == 0;
}

// Whether expanded keys and values are to be rounded: only where all they are made of is.
VLLM_MS_INLINE bool expands_to_pairs(const MlaInputs &in) {
  return in.step.cache.dtype == DType::bf16 && in.kv_b.dtype == DType::bf16;
}

// All rows against kLanes keys after the other, which stay in the first-level cache; keys beyond `end` as they come.
// Each group of rows fetches its share of `ahead`: the memory has as much time as all products take.
VLLM_MS_INLINE void score_dot(const bf16 *query, int64_t size, int64_t rows, const void *const *keys, int64_t end,
                              float *scores, Ahead ahead) {
  const int64_t lines = (ahead.bytes + kLine - 1) / kLine;
  for (int64_t j = 0; j < end; j += kLanes) {
    for_row_groups(rows, [&](auto R, int64_t row) {
      const int64_t from = lines * row / rows, to = lines * (row + R.value) / rows;
      score_pairs<R.value>(query + row * size, keys, j, j + kLanes, size, scores + row * kTileKeys,
                              {ahead.rows, ahead.offset + from * kLine, (to - from) * kLine});
    });
  }
}

// Values of a tile in pairs of keys and in chunks of columns, [lora / kPairs][kTileKeys / 2][kPairs][2]: what
// accumulate_pairs reads for all rows stays in the first-level cache.
VLLM_MS_NOINLINE void pair_values(const void *const *rows, int64_t end, int64_t lora, bf16 *out) {
  const Pairing pairing;
  for (int64_t j = 0; j < end; j += 2) {
    const bf16 *even = static_cast<const bf16 *>(rows[j]), *odd = static_cast<const bf16 *>(rows[j + 1]);
    for (int64_t d = 0; d < lora; d += kPairs) {
      __m512i pairs[2];
      pairing.pair(even + d, odd + d, pairs);
      bf16 *place = out + d * kTileKeys + j * kPairs;
      _mm512_storeu_si512(place, pairs[0]);
      _mm512_storeu_si512(place + kPairs, pairs[1]);
    }
  }
}

// accumulator[r, 0 : C * kPairs] += weights[r] . values over pairs of keys, ascending; values: C chunks of pair_values.
template <int R, int C>
VLLM_MS_NOINLINE void accumulate_pairs(float *accumulator, int64_t padded, const bf16 *weights, const bf16 *values,
                                       int64_t end) {
  constexpr int N = 2 * C;
  Vec sums[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = load(accumulator + r * padded + n * kLanes);
  }
  for (int64_t j = 0; j < end; j += 2) {
    __m512bh value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) value[n] = load_pairs(values + n / 2 * kPairs * kTileKeys + (j + n % 2) * kPairs);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512bh weight = repeat_pair(weights + r * kTileKeys + j);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = dot_pairs(weight, value[n], sums[r][n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(accumulator + r * padded + n * kLanes, sums[r][n]);
  }
}

// All rows against one run of columns after the other. Meanwhile brings `end` rows of `ahead` into the second-level
// cache.
VLLM_MS_INLINE void accumulate_dot(float *accumulator, int64_t padded, int64_t rows, const bf16 *weights,
                                   const bf16 *values, int64_t end, int64_t lora, Ahead ahead) {
  const int64_t work = (lora + 2 * kPairs - 1) / (2 * kPairs) * rows;
  int64_t done = 0;
  for (int64_t d = 0; d < lora; d += 2 * kPairs) {
    const bool two = d + kPairs < lora;
    for_row_groups(rows, [&](auto R, int64_t row) {
      for (int64_t j = end * done / work; j < end * (done + R.value) / work; ++j) prefetch(ahead, j);
      done += R.value;
      float *sums = accumulator + row * padded + d;
      const bf16 *chunk = values + d * kTileKeys;
      if (two) {
        accumulate_pairs<R.value, 2>(sums, padded, weights + row * kTileKeys, chunk, end);
      } else {
        accumulate_pairs<R.value, 1>(sums, padded, weights + row * kTileKeys, chunk, end);
      }
    });
  }
}

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
