// The inner kernel of tile_product.h: dot products of 8 weight rows with a few activation rows.
#pragma once

#include "pairs.h"

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int kTileRows = 8;    // weight rows
constexpr int kTileTokens = 3;  // activation rows, at most

// Weight rows whose sums are held in registers together, for `tokens` activation rows.
constexpr int rows_at_once(int tokens) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return tokens > 0 ? kTileRows : 0;  // 32 registers: 8 x 3 sums
#else
  return tokens == 1 ? kTileRows : kTileRows / 2;  // 16 registers: 4 x 3 sums
#endif
}

// The type that activations are packed to for weights of type T, and the elements per step of the inner loop.
template <class T>
struct Packed {
  using Type = float;
  static constexpr int kStep = kLanes;
};

#if defined(__AVX512BF16__)
template <>
struct Packed<bf16> {
  using Type = bf16;
  static constexpr int kStep = 2 * kLanes;
};
#endif

// sum + products of one step
template <class T>
VLLM_MS_INLINE Vec multiply_add(const T *w, const float *x, Vec sum) {
  return fma(load(w), load(x), sum);
}

#if defined(__AVX512BF16__)
VLLM_MS_INLINE Vec multiply_add(const bf16 *w, const bf16 *x, Vec sum) {
  return dot_pairs(load_pairs(w), load_pairs(x), sum);
}
#endif

// acc[i][j] += rows[i][begin:end] . tokens[j][begin:end]; the range is whole steps. Before each step what is at the `NP`
// places `ahead` is brought into the second-level cache, and they move on by `advance` elements.
template <int NR, int MT, int NP, class T, class X>
VLLM_MS_INLINE void accumulate(const T *const *rows, const X *const (&tokens)[MT], int64_t begin, int64_t end,
                               const T *const *ahead, int64_t advance, Vec (&acc)[NR][MT]) {
  const T *row[NR];
  const X *token[MT];
  const T *fetch[NP == 0 ? 1 : NP];
#pragma GCC unroll 8
  for (int i = 0; i < NR; ++i) row[i] = rows[i];
#pragma GCC unroll 8
  for (int j = 0; j < MT; ++j) token[j] = tokens[j];
#pragma GCC unroll 8
  for (int i = 0; i < NP; ++i) fetch[i] = ahead[i];
  for (int64_t k = begin; k < end; k += Packed<T>::kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < NR; ++i) {
      if (i < NP) {
        __builtin_prefetch(fetch[i], 0, 2);
        fetch[i] += advance;
      }
#pragma GCC unroll 8
      for (int j = 0; j < MT; ++j) acc[i][j] = multiply_add(row[i] + k, token[j] + k, acc[i][j]);
    }
  }
}

// out[i] = hsum(acc[i][column]), with hsum's order of addition.
template <int NR, int MT>
VLLM_MS_INLINE void reduce_rows(const Vec (&acc)[NR][MT], int column, float *out) {
#if defined(__AVX512F__)
  // All 8 rows at once: each round halves the lanes per row and puts two vectors' rows into one.
  static_assert(NR == 8, "eight rows");
  Vec s[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec a = acc[i][column], b = acc[i + 4][column];
    s[i] = __builtin_shuffle(a, b, IVec{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
           __builtin_shuffle(a, b, IVec{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    s[i] = __builtin_shuffle(s[i], s[i + 2], IVec{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
           __builtin_shuffle(s[i], s[i + 2], IVec{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
  }
  Vec sum = __builtin_shuffle(s[0], s[1], IVec{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
            __builtin_shuffle(s[0], s[1], IVec{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  sum += __builtin_shuffle(sum, IVec{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
  sum = __builtin_shuffle(sum, IVec{0, 2, 8, 10, 4, 6, 12, 14, 0, 2, 8, 10, 4, 6, 12, 14});
  std::memcpy(out, &sum, NR * sizeof(float));
#else
#pragma GCC unroll 8
  for (int i = 0; i < NR; ++i) out[i] = hsum(acc[i][column]);
#endif
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
