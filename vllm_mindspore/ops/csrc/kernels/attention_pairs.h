// What both kinds of attention do with one tile of keys by bf16 dot products. A row's numbers do not depend on the rows
// beside it.
#pragma once

#include "attention_tile.h"
#include "pairs.h"

#if defined(__AVX512BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {
namespace {

// As score_rows, for keys from the last multiple of 16 / R up to `begin` on; queries: [R][size].
template <int R>
VLLM_MS_NOINLINE void score_pairs(const bf16 *queries, const void *const *keys, int64_t begin, int64_t end,
                                  int64_t size, float *scores, Ahead ahead) {
  constexpr int K = 16 / R;
  for (int64_t j = begin / K * K; j < end; j += K) {
    for (int k = 0; k < K; ++k) prefetch(ahead, j + k);
    Vec sums[R * K] = {};
    for (int64_t d = 0; d < size; d += kPairs) {
      __m512bh query[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) query[r] = load_pairs(queries + r * size + d);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const __m512bh key = load_pairs(static_cast<const bf16 *>(keys[j + k]) + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r * K + k] = dot_pairs(query[r], key, sums[r * K + k]);
      }
    }
    float flat[R * K];
    store(flat, sum_each(sums));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTileKeys + j, flat + r * K, K * sizeof(float));
  }
}

// Weights of keys [begin, end) of a tile as bf16, zero for its other keys. `out` may be where `weights` are, or before.
VLLM_MS_INLINE void round_weights(const float *weights, int64_t begin, int64_t end, bf16 *out) {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    const IVec key = lane + static_cast<int32_t>(j);
    const IVec seen = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
    store_rounded(out + j, seen ? load(weights + j) : zero());
  }
}

}  // namespace
}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
