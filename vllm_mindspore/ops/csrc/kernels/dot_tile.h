// The inner kernel of linear.cc: dot products of 8 weight rows with a few activation rows.
#pragma once

#include "../vec.h"

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

VLLM_MS_INLINE __m512bh load_pairs(const bf16 *p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
#endif

// sum + products of one step
template <class T>
VLLM_MS_INLINE Vec multiply_add(const T *w, const float *x, Vec sum) {
  return fma(load(w), load(x), sum);
}

#if defined(__AVX512BF16__)
VLLM_MS_INLINE Vec multiply_add(const bf16 *w, const bf16 *x, Vec sum) {
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), load_pairs(w), load_pairs(x)));
}
#endif

// acc[i][j] += rows[i][begin:end] . x[j][begin:end]; the range is whole steps.
template <int NR, int MT, bool prefetch, class T, class X>
VLLM_MS_INLINE void accumulate(const T *const *rows, const X *x, int64_t ldx, int64_t begin, int64_t end,
                               Vec (&acc)[NR][MT]) {
  const T *row[NR];
  const X *token[MT];
#pragma GCC unroll 8
  for (int i = 0; i < NR; ++i) row[i] = rows[i];
#pragma GCC unroll 8
  for (int j = 0; j < MT; ++j) token[j] = x + j * ldx;
  for (int64_t k = begin; k < end; k += Packed<T>::kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < NR; ++i) {
      if (prefetch) __builtin_prefetch(reinterpret_cast<const char *>(row[i] + k) + 1024, 0, 3);
#pragma GCC unroll 8
      for (int j = 0; j < MT; ++j) acc[i][j] = multiply_add(row[i] + k, token[j] + k, acc[i][j]);
    }
  }
}

// out[i] = hsum(acc[i][column]), with hsum's order of addition.
template <int NR, int MT>
VLLM_MS_INLINE void reduce_rows(const Vec (&acc)[NR][MT], int column, float *out) {
#pragma GCC unroll 8
  for (int i = 0; i < NR; ++i) out[i] = hsum(acc[i][column]);
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms
