// bf16 in pairs, as the dot products of AVX512-BF16 take them: what the products and both kinds of attention share.
#pragma once

#include <type_traits>

#include "../vec.h"

#if defined(__AVX512BF16__)

namespace vllm_ms {
namespace VLLM_MS_ISA {

constexpr int64_t kPairs = 2 * kLanes;  // elements of a vector of bf16

VLLM_MS_INLINE __m512bh load_pairs(const void *p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

// The two elements at `p` in all lanes.
VLLM_MS_INLINE __m512bh repeat_pair(const bf16 *p) {
  int32_t both;
  std::memcpy(&both, p, sizeof(both));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}

// Elements of two rows side by side: (a0, b0, a1, b1, ...).
struct Pairing {
  __m512i low, high;

  Pairing() {
    alignas(64) uint16_t first[32], second[32];
    for (int i = 0; i < 16; ++i) {
      first[2 * i] = i;
      first[2 * i + 1] = 32 + i;
      second[2 * i] = 16 + i;
      second[2 * i + 1] = 48 + i;
    }
    low = _mm512_load_si512(first);
    high = _mm512_load_si512(second);
  }
  // kPairs elements of each row become two vectors of pairs.
  void pair(const bf16 *even, const bf16 *odd, __m512i (&out)[2]) const {
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    out[0] = _mm512_permutex2var_epi16(a, low, b);
    out[1] = _mm512_permutex2var_epi16(a, high, b);
  }
};

// out[j][i] = in[i][j] of 16 x 16 values of 4 bytes, in registers.
VLLM_MS_INLINE void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // v[4 r + c] has, in each quarter q, column 4 q + c of rows 4 r .. 4 r + 3
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd), e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// sum + a . b, lane by lane
VLLM_MS_INLINE Vec dot_pairs(__m512bh a, __m512bh b, Vec sum) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}

// To bf16 by the processor's own rounding, which takes subnormal numbers for zero.
VLLM_MS_INLINE void store_rounded(bf16 *p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &rounded, sizeof(rounded));
}

}  // namespace VLLM_MS_ISA
}  // namespace vllm_ms

#endif
